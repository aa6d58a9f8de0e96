"""Does an update belong into the sum? Every clause is a named refusal; nothing is repaired.

Shapes, dtypes and names are compared with the anchor; numbers must be finite; statistics must be what
their kind promises: a diagonal is not negative, a Gram matrix is symmetric and positive semi-definite.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from fedbasin.strategies.fusion.precision import Diagonal, Gram, Precision
from fedbasin.strategies.fusion.update import Block, Update, join
from fedbasin.strategies.outcome import Outcome, Refusal
from fedbasin.strategies.state import State, floating

# Relative slack for statistics that were summed and sent in float32.
_ROUNDING = 1e-5


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
    for name, tensor in update.parameters.items():
        _check_tensor(name, tensor, anchor[name])
    _check_blocks(update.precisions, blocks, anchor)
    for block, precision in update.precisions.items():
        _check_precision(block, precision, anchor)


def check_examples(examples: float) -> None:
    """Check a client's weight; raises a Refusal as `check_update` does."""
    if not (math.isfinite(examples) and examples > 0):
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
    if not _is_finite(tensor):
        raise Refusal(Outcome.non_finite, name)


def _check_blocks(
    precisions: Collection[Block], expected: Collection[Block] | None, anchor: State
) -> None:
    unknown = [block for block in precisions if not all(name in anchor for name in block)]
    if expected is not None:
        unknown += [block for block in precisions if block not in expected]
    if unknown:
        raise Refusal(Outcome.unexpected_statistic, _list(["+".join(b) for b in unknown]))
    missing = [block for block in expected or () if block not in precisions]
    if missing:
        raise Refusal(Outcome.missing_statistic, _list(["+".join(b) for b in missing]))


def _check_precision(block: Block, precision: Precision, anchor: State) -> None:
    name = "+".join(block)
    if isinstance(precision, Diagonal):
        _check_statistic(name, precision.values, join(block, anchor).numel())
        if bool((precision.values < 0).any()):
            raise Refusal(Outcome.not_positive, f"the Fisher diagonal of {name}")
    if isinstance(precision, Gram):
        inputs = join(block, anchor).shape[-1]
        _check_statistic(name, precision.matrix, inputs * inputs)
        _check_gram(name, precision.matrix)


def _check_statistic(name: str, values: Tensor, size: int) -> None:
    if values.numel() != size:
        raise Refusal(
            Outcome.wrong_shape, f"the statistic of {name} has {values.numel()} entries, not {size}"
        )
    if not _is_finite(values):
        raise Refusal(Outcome.non_finite, f"the statistic of {name}")


def _check_gram(name: str, matrix: Tensor) -> None:
    scale = float(matrix.abs().max())
    if float((matrix - matrix.mT).abs().max()) > _ROUNDING * scale:
        raise Refusal(Outcome.not_symmetric, f"the Gram matrix of {name}")
    # Rounding can push the smallest eigenvalue below zero by this much, and no further.
    slack = max(_ROUNDING * scale, torch.finfo(torch.float64).tiny)
    lifted = matrix.double() + slack * torch.eye(len(matrix), dtype=torch.float64)
    if int(torch.linalg.cholesky_ex(lifted).info):
        raise Refusal(Outcome.not_positive, f"the Gram matrix of {name}")


def _is_finite(tensor: Tensor) -> bool:
    # One sum instead of a mask as large as the tensor; it is not finite if any entry is not. A finite
    # tensor whose sum overflows is looked at entry by entry.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(
        torch.isfinite(tensor).all()
    )


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
