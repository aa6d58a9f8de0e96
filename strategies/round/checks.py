"""Does an update belong into the sum? Every clause is a named refusal; nothing is repaired.

Shapes, dtypes and names are compared with the anchor; numbers must be finite; statistics must be what
their kind promises: a diagonal is not negative, a Gram matrix is symmetric and positive semi-definite.
"""

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block, LayerGraph
from fedbasin.strategies.fusion.compression.formats import Piece
from fedbasin.strategies.fusion.kronecker_precision import MOST_PRODUCTS, Kronecker
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Precision, Sketched, common
from fedbasin.strategies.fusion.update import Update, join, stored, weight_of
from fedbasin.strategies.round.outcomes import Outcome, Refusal
from fedbasin.strategies.tensors.parallel import is_finite, one_core
from fedbasin.strategies.tensors.state import State, floating

# A count beyond this is none, and its product with a weight could overflow the sum.
_MOST_EXAMPLES = 2**53

# How far a Gram matrix that was summed and sent in float32 may be from symmetric, relative to its largest
# entry, and from positive semi-definite, relative to its mean diagonal. The latter is below every ridge of the
# catalogue: what passes cannot make the regularised sum singular.
_ASYMMETRY = 1e-5
_INDEFINITENESS = 1e-4


def check_update(update: Update, anchor: State, blocks: Collection[Block] | None = None) -> None:
    """Check one update against the anchor of its round.

    Args:
        update: as decoded.
        anchor: the global model that was sent.
        blocks: the blocks that must have a precision; None where the first client decides.

    Raises:
        Refusal: with the outcome, and the tensor where it happened.
    """
    check_examples(update.examples)
    _check_names(update.parameters, anchor)
    with one_core():
        for name, tensor in update.parameters.items():
            _check_tensor(name, tensor, anchor[name])
    _check_blocks(update.precisions, blocks, anchor)
    _check_precisions(update.precisions, anchor)


def check_fit(
    update: Update,
    model: State,
    blocks: Collection[Block],
    measured: State,
    others: Mapping[Block, tuple[Precision, Tensor]],
) -> None:
    """Check what a client says of layers that are fitted.

    Args:
        update: as decoded, without weights.
        model: the model so far.
        blocks: the layers that were asked for.
        measured: the model's running statistics that were asked for.
        others: the sums of the clients before, empty for the first.

    Raises:
        Refusal: as `check_update`.
    """
    check_examples(update.examples)
    _check_blocks(update.precisions, blocks, model)
    _check_precisions(update.precisions, model)
    _refuse(Outcome.missing_statistic, [b for b in update.precisions if b not in update.moments])
    for block in update.precisions:
        _check_statistic("+".join(block), update.moments[block], tuple(join(block, model).shape))
    _check_measured(update.parameters, measured)
    check_alike(update, others)


def _check_measured(parameters: State, measured: State) -> None:
    _check_names(parameters, measured)
    for name, tensor in parameters.items():
        _check_tensor(name, tensor, measured[name])
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise Refusal(Outcome.not_positive, name)


def check_pieces(
    name: str, pieces: Collection[Tensor], expected: Mapping[str, Piece], groups: tuple[int, ...]
) -> None:
    """Check that what a client sends of a statistic is what its form has; raises as `check_update`.

    Args:
        name: of the block.
        pieces: in the order of the form.
        expected: the form's pieces.
        groups: leading sizes of every piece.
    """
    if len(pieces) != len(expected):
        wanted = f"{len(expected)}: {', '.join(expected)}"
        raise Refusal(
            Outcome.wrong_shape, f"the statistic of {name} has {len(pieces)} parts, not {wanted}"
        )
    for piece, (part, like) in zip(pieces, expected.items(), strict=True):
        where = f"{name}, its {part}"
        if piece.dtype != like.dtype:
            sizes = f"{piece.dtype}, not {like.dtype}"
            raise Refusal(Outcome.wrong_dtype, f"the statistic of {where} is {sizes}")
        _check_statistic(where, piece, (*groups, *like.shape))


def check_alike(update: Update, others: Mapping[Block, tuple[Precision, Tensor]]) -> None:
    """Check that an update's precisions can be added to those of the clients before.

    Gram matrices are of as many groups; Kronecker factors can be kept.
    """
    for block, precision in update.precisions.items():
        other = others.get(block, (precision,))[0]
        if isinstance(precision, Gram) and isinstance(other, Gram):
            _check_statistic("+".join(block), precision.matrix, tuple(other.matrix.shape))
        if isinstance(other, Kronecker) and len(other.inputs) >= MOST_PRODUCTS:
            raise Refusal(
                Outcome.too_many, f"{len(other.inputs)} clients' Kronecker factors are kept already"
            )


def check_layer_graph(layer_graph: LayerGraph | None, model: State) -> None:
    """Check that a client's layer graph is one of the model's; raises as `check_update`."""
    if layer_graph is None:
        raise Refusal(Outcome.missing_statistic, "the layer graph")
    named = [block for level in layer_graph.levels for block in level]
    strange = [block for block in named if not _is_layer(block, model)]
    if strange or len(set(named)) < len(named):
        raise Refusal(Outcome.malformed, f"the layer graph names {strange or 'some twice'}")
    if not named or (layer_graph.head and layer_graph.head not in named):
        raise Refusal(Outcome.malformed, f"the layer graph lacks {layer_graph.head or 'them all'}")
    for norm in layer_graph.norms:
        tensors = [floating(model).get(name) for name in (*norm.measured, *norm.learned)]
        shapes = {None if tensor is None else tensor.shape for tensor in tensors}
        if None in shapes or len(shapes) > 1 or not 0 < norm.eps < math.inf:
            raise Refusal(Outcome.malformed, f"{norm} is no BatchNorm of the model")


def check_frozen(parameters: State, anchor: State, factor: str) -> None:
    """Check that a factor of adapters is as it was sent; raises a Refusal as `check_update` does.

    Args:
        parameters: of the update, of the anchor's names and shapes.
        anchor: the global model that was sent.
        factor: `lora_A` or `lora_B`; empty where all are trained.
    """
    if not factor:
        return
    marks = factor, factor.replace("lora_", "lora_embedding_")
    frozen = [name for name in parameters if any(mark in name for mark in marks)]
    if changed := [n for n in frozen if not torch.equal(parameters[n], anchor[n])]:
        raise Refusal(Outcome.frozen_changed, _list(changed))


def check_examples(examples: float) -> None:
    """Check a client's weight; raises a Refusal as `check_update` does."""
    if not 0 < examples <= _MOST_EXAMPLES:
        raise Refusal(Outcome.bad_weight, f"examples = {examples}")


def _check_names(parameters: State, anchor: State) -> None:
    # Counters and indices may stay at home: they are never averaged.
    missing = sorted(floating(anchor).keys() - parameters.keys())
    if missing:
        raise Refusal(Outcome.missing_tensor, _list(missing))
    unexpected = sorted(parameters.keys() - anchor.keys())
    if unexpected:
        raise Refusal(Outcome.unexpected_tensor, _list(unexpected))


def _check_tensor(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        sizes = f"{tuple(tensor.shape)} where the global model has {tuple(like.shape)}"
        raise Refusal(Outcome.wrong_shape, f"{name} is {sizes}")
    if tensor.dtype != like.dtype:
        raise Refusal(Outcome.wrong_dtype, f"{name} is {tensor.dtype}, not {like.dtype}")
    if not is_finite(tensor):
        raise Refusal(Outcome.non_finite, name)


def _check_blocks(
    precisions: Collection[Block], expected: Collection[Block] | None, anchor: State
) -> None:
    known = [block for block in precisions if _is_block(block, anchor)]
    if expected is not None:
        known = [block for block in known if block in expected]
    _refuse(Outcome.unexpected_statistic, [block for block in precisions if block not in known])
    _refuse(Outcome.missing_statistic, [block for block in expected or () if block not in known])
    names = [name for block in known for name in stored(block)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Refusal(Outcome.unexpected_statistic, f"{_list(twice)} in more than one block")


def _is_block(block: Block, anchor: State) -> bool:
    """Whether the names can be joined: a weight, or a matrix and its bias."""
    tensors = [anchor[name] for name in stored(block) if name in floating(anchor)]
    if not block or len(tensors) < len(block):
        return False
    if block != stored(block) and tensors[0].dim() != 2:
        return False
    shapes = [weight_of(block, anchor).shape, *(bias.shape for bias in tensors[1:])]
    return len(shapes) == 1 or (
        len(shapes) == 2 and len(shapes[0]) > 1 and shapes[1] == shapes[0][:1]
    )


def _is_layer(block: Block, model: State) -> bool:
    """Whether the block is multiplied with inputs, so that it can be fitted."""
    return _is_block(block, model) and weight_of(block, model).dim() > 1


def _refuse(outcome: Outcome, blocks: Iterable[Block]) -> None:
    if names := ["+".join(block) for block in blocks]:
        raise Refusal(outcome, _list(names))


def _check_precisions(precisions: Mapping[Block, Precision], anchor: State) -> None:
    for block, precision in precisions.items():
        _check_precision(block, precision, anchor)
    for first, *_ in common(precisions):
        if isinstance(gram := precisions[first], Gram):
            _check_gram("+".join(first), gram.matrix)


def _check_precision(block: Block, precision: Precision, anchor: State) -> None:
    name, weight = "+".join(block), weight_of(block, anchor)
    if isinstance(precision, Diagonal):
        if len(block) > 1:
            raise Refusal(Outcome.unexpected_statistic, f"a Fisher diagonal of {name} together")
        _check_statistic(name, precision.values, tuple(weight.shape))
        if bool((precision.values < 0).any()):
            raise Refusal(Outcome.not_positive, f"the Fisher diagonal of {name}")
    if isinstance(precision, Kronecker):
        _check_kronecker(block, precision, anchor)
    if isinstance(precision, Sketched):
        _check_sketched(block, precision, anchor)
    if isinstance(precision, Gram):
        if weight.dim() < 2:
            raise Refusal(Outcome.unexpected_statistic, f"a Gram matrix of {name}, no matrix")
        outputs, inputs = join(block, anchor).shape
        groups = precision.matrix.shape[:-2]
        if len(groups) > 1 or (groups and (not groups[0] or outputs % groups[0])):
            raise Refusal(
                Outcome.wrong_shape, f"the statistic of {name} has groups {tuple(groups)}"
            )
        _check_statistic(name, precision.matrix, (*groups, inputs, inputs))


def _check_kronecker(block: Block, precision: Kronecker, anchor: State) -> None:
    name = "+".join(block)
    if weight_of(block, anchor).dim() < 2:
        raise Refusal(Outcome.unexpected_statistic, f"Kronecker factors of {name}, no matrix")
    outputs, inputs = join(block, anchor).shape
    for side, factor, size in (
        ("inputs", precision.inputs, inputs),
        ("outputs", precision.outputs, outputs),
    ):
        _check_statistic(f"{name}, its {side}", factor, (1, size, size))
        _check_gram(f"{name}, its {side}", factor)


def _check_sketched(block: Block, precision: Sketched, anchor: State) -> None:
    name = "+".join(block)
    if weight_of(block, anchor).dim() < 2:
        raise Refusal(Outcome.unexpected_statistic, f"a Gram matrix of {name}, no matrix")
    _, inputs = join(block, anchor).shape
    _check_statistic(f"{name}, its rows", precision.rows, (len(precision.rows), inputs))
    _check_statistic(f"{name}, its spread", precision.spread, (inputs,))
    if bool((precision.spread < 0).any()):
        raise Refusal(Outcome.not_positive, f"the Gram matrix of {name}")


def _check_statistic(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        sizes = f"{tuple(values.shape)}, not {shape}"
        raise Refusal(Outcome.wrong_shape, f"the statistic of {name} is {sizes}")
    if not is_finite(values):
        raise Refusal(Outcome.non_finite, f"the statistic of {name}")


def _check_gram(name: str, matrix: Tensor) -> None:
    scale = float(matrix.abs().max())
    if float((matrix - matrix.mT).abs().max()) > _ASYMMETRY * scale:
        raise Refusal(Outcome.not_symmetric, f"the Gram matrix of {name}")
    lifted = matrix.double().clone()
    diagonal = lifted.diagonal(dim1=-2, dim2=-1)
    slack = _INDEFINITENESS * float(diagonal.mean())
    diagonal.add_(max(slack, torch.finfo(torch.float64).tiny))
    if bool(torch.linalg.cholesky_ex(lifted).info.any()):
        raise Refusal(Outcome.not_positive, f"the Gram matrix of {name}")


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
