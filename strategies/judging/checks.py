"""Checks of an update before it becomes part of the sum: every failure is a named refusal, nothing is repaired.

Shapes, dtypes and names are compared with the anchor, and numbers must be finite. Statistics are checked in
`statistic_checks`.
"""

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block, LayerGraph
from fedbasin.strategies.fusion.kronecker_precision import MOST_PRODUCTS, Kronecker
from fedbasin.strategies.fusion.precisions import Gram, Precision
from fedbasin.strategies.fusion.update import Update, join, tensor_names, weight_of
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.judging.statistic_checks import MOST_VARIANCE, check_precisions, check_statistic
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.tensors.parallel import distances, is_finite
from fedbasin.strategies.tensors.state import State, added_prefix, floating

# A larger count is not one of examples, and its product with a weight could overflow the sum.
_MOST_EXAMPLES = 2**53


def check_update(update: Update, anchor: State, blocks: Collection[Block] | None = None) -> dict[str, float]:
    """Check one update against the anchor of its round; return the distances of its tensors from the anchor's.

    Args:
        update: the update as decoded.
        anchor: the global model that was sent.
        blocks: the layers that must have a precision; None lets the first client decide.

    Raises:
        Refusal: the update fails a check; names the outcome and the tensor.
    """
    check_examples(update.examples)
    distances_of_model = check_model(update.parameters, anchor)
    check_blocks(update.precisions, blocks, anchor)
    check_precisions(update.precisions, anchor)
    return distances_of_model


def check_fit(update: Update, model: State, blocks: Collection[Block], measured: State) -> dict[str, float]:
    """Check the statistics of layers that are fitted; return the distances of running statistics from the model's.

    Args:
        update: the update as decoded, without weights.
        model: the model so far.
        blocks: the layers that were requested.
        measured: the model's running statistics that were requested.

    Raises:
        Refusal: the update fails a check; names the outcome and the layer.
    """
    check_examples(update.examples)
    check_blocks(update.precisions, blocks, model)
    check_precisions(update.precisions, model)
    _refuse(Outcome.missing_statistic, [b for b in update.precisions if b not in update.cross_moments])
    for block in update.precisions:
        check_statistic("+".join(block), update.cross_moments[block], tuple(join(block, model).shape))
    return check_model(update.parameters, measured)


def check_alike(update: Update, sums: Mapping[Block, tuple[Precision, Tensor]]) -> None:
    """Check that an update's precisions can be added to the sums of earlier clients.

    Gram matrices must have as many groups, and Kronecker factors must find a place.
    """
    for block, precision in update.precisions.items():
        total = sums.get(block, (precision,))[0]
        if isinstance(precision, Gram) and isinstance(total, Gram):
            check_statistic("+".join(block), precision.matrix, tuple(total.matrix.shape))
        if isinstance(total, Kronecker) and len(total.inputs) >= MOST_PRODUCTS:
            raise Refusal(Outcome.too_many, f"{len(total.inputs)} clients' Kronecker factors are kept already")


def check_layer_graph(layer_graph: LayerGraph | None, model: State) -> None:
    """Check that a client's layer graph names layers of the model, each once; raises a Refusal if not."""
    if layer_graph is None:
        raise Refusal(Outcome.missing_statistic, "the layer graph")
    named = [block for level in layer_graph.levels for block in level]
    strange = [block for block in named if not _is_layer(block, model)]
    if strange or len(set(named)) < len(named):
        raise Refusal(Outcome.malformed, f"the layer graph names {strange or 'some twice'}")
    if layer_graph.head_target not in ("", Target.values.name):
        raise Refusal(Outcome.malformed, f"the layer graph fits its head to {layer_graph.head_target!r}")
    if not named or (layer_graph.head and layer_graph.head not in named):
        raise Refusal(Outcome.malformed, f"the layer graph lacks {layer_graph.head or 'them all'}")
    for norm in layer_graph.norms:
        tensors = [floating(model).get(name) for name in (*norm.statistics, *norm.parameters)]
        shapes = {None if tensor is None else tensor.shape for tensor in tensors}
        if None in shapes or len(shapes) > 1 or not 0 < norm.eps < math.inf:
            raise Refusal(Outcome.malformed, f"{norm} is no BatchNorm of the model")


def check_model(parameters: State, anchor: State) -> dict[str, float]:
    """Check the names, shapes, dtypes and entries of a client's model.

    Entries are read once: a distance from the anchor that is not finite shows where to look for those that are not.

    Returns:
        The Euclidean distance of each floating tensor from the anchor's.

    Raises:
        Refusal: the tensors cannot be summed.
    """
    _check_names(parameters, anchor)
    for name, tensor in parameters.items():
        _check_form(name, tensor, anchor[name])
    lengths = distances({name: (tensor, anchor[name]) for name, tensor in floating(parameters).items()})
    for name, length in lengths.items():
        _check_entries(name, parameters[name], anchor[name], length)
    return lengths


def check_frozen(parameters: State, anchor: State, factor: str) -> None:
    """Check that a frozen factor of adapters is as it was sent; raises a Refusal if not.

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
    """Check that a client's weight is a finite number above zero; raises a Refusal if not."""
    if not 0 < examples <= _MOST_EXAMPLES:
        raise Refusal(Outcome.bad_weight, f"examples = {examples}")


def _check_names(parameters: State, anchor: State) -> None:
    # Counters and indices may stay at home: the mean is that of the clients that send them.
    missing = sorted(floating(anchor).keys() - parameters.keys())
    unexpected = sorted(parameters.keys() - anchor.keys())
    if missing:
        instead = f"; in place of them it has {_list(unexpected)}" if unexpected else ""
        prefix = added_prefix(set(unexpected), missing)
        advice = f"; send the state dict of the model within, without {prefix!r}" if prefix else ""
        raise Refusal(Outcome.missing_tensor, f"{_list(missing)}{instead}{advice}")
    if unexpected:
        raise Refusal(Outcome.unexpected_tensor, _list(unexpected))


def _check_form(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        sizes = f"{tuple(tensor.shape)} where the global model has {tuple(like.shape)}"
        raise Refusal(Outcome.wrong_shape, f"{name} is {sizes}")
    if tensor.dtype != like.dtype:
        raise Refusal(Outcome.wrong_dtype, f"{name} is {tensor.dtype}, not {like.dtype}")


def _check_entries(name: str, tensor: Tensor, like: Tensor, distance: float) -> None:
    if not math.isfinite(distance) and not is_finite(tensor) and not _is_infinite_by_design(tensor, like):
        raise Refusal(Outcome.non_finite, name)
    if name.endswith("running_var"):
        _check_variance(name, tensor, like)


def _is_infinite_by_design(tensor: Tensor, like: Tensor) -> bool:
    """Return True if the entries that are not finite are those of the global model, as in a mask of -inf."""
    infinite = ~tensor.isfinite()
    return torch.equal(infinite, ~like.isfinite()) and torch.equal(tensor[infinite], like[infinite])


def _check_variance(name: str, variance: Tensor, like: Tensor) -> None:
    if bool((variance < 0).any()):
        raise Refusal(Outcome.not_positive, f"{name} has the variance {float(variance.min()):.3g}")
    most = float(variance.max()) if variance.numel() else 0.0
    if most > MOST_VARIANCE * max(1.0, float(like.max())):
        raise Refusal(Outcome.out_of_line, f"{name} has the variance {most:.3g}, as no finite inputs give")


def check_blocks(precisions: Collection[Block], expected: Collection[Block] | None, anchor: State) -> None:
    """Check that statistics are those of the expected layers, or of any; raises a Refusal if not."""
    valid = [block for block in precisions if _is_block(block, anchor)]
    if expected is not None:
        valid = [block for block in valid if block in expected]
    _refuse(Outcome.unexpected_statistic, [block for block in precisions if block not in valid])
    _refuse(Outcome.missing_statistic, [block for block in expected or () if block not in valid])
    names = [name for block in valid for name in tensor_names(block)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Refusal(Outcome.unexpected_statistic, f"{_list(twice)} in more than one block")


def _is_block(block: Block, anchor: State) -> bool:
    """Return True if the names are those of a weight, or of a matrix and its bias."""
    tensors = [anchor[name] for name in tensor_names(block) if name in floating(anchor)]
    if not block or len(tensors) < len(block):
        return False
    if block != tensor_names(block) and tensors[0].dim() != 2:
        return False
    shapes = [weight_of(block, anchor).shape, *(bias.shape for bias in tensors[1:])]
    return len(shapes) == 1 or (len(shapes) == 2 and len(shapes[0]) > 1 and shapes[1] == shapes[0][:1])


def _is_layer(block: Block, model: State) -> bool:
    """Return True if the layer multiplies its inputs, so that it can be fitted."""
    return _is_block(block, model) and weight_of(block, model).dim() > 1


def _refuse(outcome: Outcome, blocks: Iterable[Block]) -> None:
    if names := ["+".join(block) for block in blocks]:
        raise Refusal(outcome, _list(names))


def _list(names: list[str]) -> str:
    # A client can send a tensor without a name.
    shown = ", ".join(name or "''" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
