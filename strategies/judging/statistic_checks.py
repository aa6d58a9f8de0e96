"""Checks of a client's statistics: each must be what its kind promises, and its parts must belong together.

A diagonal is not negative, a Gram matrix is symmetric and positive semi-definite. What belongs together: the last input
of a layer with a bias is a one, so that the last column of its Gram matrix holds the number of rows N and the sums s of
the inputs, and the sums of a head's classes are parts of them.

    0 <= N        s_i^2 <= N G_ii        sum_c n_c = N        sum_c m_c = s        sum_c m_ci^2 / n_c <= G_ii

The second and the last say that variances, of all rows and within classes, are not negative.
"""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.compression.formats import Piece
from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Precision, Sketched, common
from fedbasin.strategies.fusion.update import join, weight_of
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.tensors.parallel import is_finite
from fedbasin.strategies.tensors.state import State

# Activations beyond 1e9 times those so far would not train: their gradients, and this network, would have overflowed.
MOST_VARIANCE = 1e18

# Tolerances of a Gram matrix that was summed and sent in float32: of symmetry, relative to its largest entry, and of
# positive semi-definiteness, relative to its mean diagonal. The latter is below every ridge of the recipes, so that a
# matrix that passes cannot make the regularised sum singular.
_ASYMMETRY = 1e-5
_INDEFINITENESS = 1e-4

# Relative tolerances of sums that belong together: of those in float32, and of those in forms of eight bits.
_ROUNDING = 1e-3
_COARSE = 0.05
# A mean square below the smallest normal number in float32 may have become zero on its way.
_VANISHED = torch.finfo(torch.float32).tiny
# Least number of examples of a class that is divided by, as inexact sums can make it anything near zero.
_LEAST = 0.5


def check_pieces(name: str, pieces: Collection[Tensor], expected: Mapping[str, Piece], groups: tuple[int, ...]) -> None:
    """Check that the tensors of a statistic are those of its form.

    Args:
        name: name of the layer.
        pieces: the tensors, in the order of the form.
        expected: the form's pieces.
        groups: leading sizes of every piece.

    Raises:
        Refusal: a tensor is missing, or has another shape or dtype.
    """
    if len(pieces) != len(expected):
        raise Refusal(
            Outcome.wrong_shape,
            f"the statistic of {name} has {len(pieces)} parts, not {len(expected)}: {', '.join(expected)}",
        )
    for piece, (part, like) in zip(pieces, expected.items(), strict=True):
        where = f"{name}, its {part}"
        if piece.dtype != like.dtype:
            sizes = f"{piece.dtype}, not {like.dtype}"
            raise Refusal(Outcome.wrong_dtype, f"the statistic of {where} is {sizes}")
        check_statistic(where, piece, (*groups, *like.shape))


def check_precisions(precisions: Mapping[Block, Precision], anchor: State) -> None:
    """Check the precision of each layer; raises a Refusal that names the layer."""
    for block, precision in precisions.items():
        _check_precision(block, precision, anchor)
    for block, *_ in common(precisions):
        if isinstance(gram := precisions[block], Gram):
            _check_gram("+".join(block), gram.matrix, has_ones=len(block) > 1)


def _check_precision(block: Block, precision: Precision, anchor: State) -> None:
    name, weight = "+".join(block), weight_of(block, anchor)
    if isinstance(precision, Diagonal):
        if len(block) > 1:
            raise Refusal(Outcome.unexpected_statistic, f"a Fisher diagonal of {name} together")
        check_statistic(name, precision.values, tuple(weight.shape))
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
            raise Refusal(Outcome.wrong_shape, f"the statistic of {name} has groups {tuple(groups)}")
        check_statistic(name, precision.matrix, (*groups, inputs, inputs))


def _check_kronecker(block: Block, precision: Kronecker, anchor: State) -> None:
    name = "+".join(block)
    if weight_of(block, anchor).dim() < 2:
        raise Refusal(Outcome.unexpected_statistic, f"Kronecker factors of {name}, no matrix")
    outputs, inputs = join(block, anchor).shape
    for side, factor, size in (("inputs", precision.inputs, inputs), ("outputs", precision.outputs, outputs)):
        check_statistic(f"{name}, its {side}", factor, (1, size, size))
        _check_gram(f"{name}, its {side}", factor, has_ones=side == "inputs" and len(block) > 1)


def _check_sketched(block: Block, precision: Sketched, anchor: State) -> None:
    name = "+".join(block)
    if weight_of(block, anchor).dim() < 2:
        raise Refusal(Outcome.unexpected_statistic, f"a Gram matrix of {name}, no matrix")
    _, inputs = join(block, anchor).shape
    check_statistic(f"{name}, its rows", precision.rows, (len(precision.rows), inputs))
    check_statistic(f"{name}, its spread", precision.spread, (inputs,))
    if bool((precision.spread < 0).any()):
        raise Refusal(Outcome.not_positive, f"the Gram matrix of {name}")


def check_statistic(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    """Check the shape of a statistic's tensor and that it is finite; raises a Refusal with the name of its layer."""
    if values.shape != shape:
        sizes = f"{tuple(values.shape)}, not {shape}"
        raise Refusal(Outcome.wrong_shape, f"the statistic of {name} is {sizes}")
    if not is_finite(values):
        raise Refusal(Outcome.non_finite, f"the statistic of {name}")


def check_head(block: Block, precision: Precision, sums: Float[Tensor, "classes inputs"]) -> None:
    """Check that the sums of a head's classes are parts of the sums of all rows.

    Nothing is known of a head without a bias, or of a sketch: neither tells the number of rows.

    Args:
        block: names of the head's weight and bias.
        precision: Gram matrix of the head's inputs.
        sums: sum of the inputs of each class.

    Raises:
        Refusal: the sums contradict each other; names the layer and what does not fit.
    """
    if len(block) == 1 or not isinstance(precision, Gram):
        return
    name, gram = "+".join(block), precision.matrix
    squares, factors = float(gram[-1, -1]), float(sums[:, -1].sum())
    if not squares and not factors:
        _refuse_contradiction(name, "classes with inputs and no examples", bool((sums != 0).any()))
        return
    _refuse_contradiction(name, f"{squares:.4g} rows and {factors:.4g} with a class", not (squares and factors))
    # A temperature behind the head scales its inputs, the one of the bias too.
    scale = squares / factors
    counts, rows = sums[:, -1] / scale, squares / scale**2
    _refuse_contradiction(name, f"a class of {float(counts.min()):.4g} examples", bool(counts.min() < -_COARSE * rows))
    diagonal = gram.diagonal() + squares * _VANISHED
    spread = (diagonal * squares).sqrt()
    # In 16 bits a class's sums have steps of 2^-24 of its largest one, which may be its count.
    steps = 2**-23 * abs(scale) * sums.abs().amax(1).sum()
    strange = (sums.sum(0) * scale - gram[-1]).abs() > _COARSE * spread + steps
    _refuse_contradiction(name, "classes whose sums are not those of all rows", bool(strange.any()))
    between = (sums.square() / counts.clamp(min=_LEAST)[:, None]).sum(0)
    excess = between > (1 + _COARSE) ** 2 * diagonal + _COARSE * diagonal.mean()
    _refuse_contradiction(name, "a class whose inputs have a negative variance", bool(excess.any()))


def _refuse_contradiction(name: str, what: str, is_contradiction: bool) -> None:
    if is_contradiction:
        raise Refusal(Outcome.inconsistent, f"the statistic of {name} has {what}")


def _check_rows(name: str, matrix: Float[Tensor, "*groups inputs inputs"]) -> None:
    """Check the column of ones of a Gram matrix against its diagonal."""
    rows, sums, squares = matrix[..., -1, -1:], matrix[..., :-1, -1], matrix.diagonal(dim1=-2, dim2=-1)[..., :-1]
    if bool((rows < 0).any()):
        raise Refusal(Outcome.not_positive, f"the Gram matrix of {name} has {float(rows.min()):.4g} rows")
    _refuse_contradiction(name, "inputs and no rows", bool(((rows == 0) & (squares != 0)).any()))
    if bool((sums.square() > (1 + _ROUNDING) * rows * (squares + rows * _VANISHED)).any()):
        raise Refusal(Outcome.not_positive, f"the Gram matrix of {name} has an input with a negative variance")
    largest = float((squares / rows.clamp(min=torch.finfo(rows.dtype).tiny)).max()) if squares.numel() else 0.0
    if largest > MOST_VARIANCE:
        raise Refusal(
            Outcome.out_of_line, f"the inputs of {name} have the mean square {largest:.3g}, as no finite inputs give"
        )


def _check_gram(name: str, matrix: Tensor, *, has_ones: bool) -> None:
    scale = float(matrix.abs().max())
    if float((matrix - matrix.mT).abs().max()) > _ASYMMETRY * scale:
        raise Refusal(Outcome.not_symmetric, f"the Gram matrix of {name}")
    if has_ones:
        _check_rows(name, matrix)
    lifted = matrix.double().clone()
    diagonal = lifted.diagonal(dim1=-2, dim2=-1)
    slack = _INDEFINITENESS * float(diagonal.mean())
    diagonal.add_(max(slack, torch.finfo(torch.float64).tiny))
    if bool(torch.linalg.cholesky_ex(lifted).info.any()):
        raise Refusal(Outcome.not_positive, f"the Gram matrix of {name}")
