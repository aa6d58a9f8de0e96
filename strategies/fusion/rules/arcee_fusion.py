"""Arcee fusion: only the changes of the second model that matter most are taken over.

    importance = |b - a| KL(softmax(b) || softmax(a))        softmax over each row
    taken where importance >= median + 1.5 (third quartile - first quartile)

Source: Arcee AI 2025, documentation of mergekit's method `arcee_fusion`. There quartiles of tensors with more than a
million entries come from a random sample; here they are exact.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedbasin.strategies.tensors.pieces import map_rows, order_statistics, working_dtype

# Probabilities are raised by this, so that their logarithms are finite.
_FLOOR = 1e-8


def arcee_fusion(anchor: Tensor, tensors: Sequence[Tensor], _weights: Sequence[float]) -> Tensor:
    """Return the anchor with the most important entries of the other tensor."""
    pair = (anchor, *tensors)
    if not anchor.numel():
        return anchor.clone()
    importance = map_rows(_importance, [tensor.to(working_dtype(anchor)) for tensor in pair])
    quartiles = [int(q * (anchor.numel() - 1)) for q in (0.25, 0.5, 0.75)]
    lower, median, upper = order_statistics(lambda rows: rows[0], (importance,), quartiles)
    threshold = median + 1.5 * (upper - lower)
    return map_rows(lambda block: torch.where(_importance(block) >= threshold, block[1], block[0]), pair)


def _importance(block: Tensor) -> Tensor:
    a, b = torch.softmax(block, dim=-1) + _FLOOR
    divergence = (b * (b / a).log()).sum(dim=-1, keepdim=True)
    # Rounding may leave a divergence of equal rows just below zero.
    return (block[1] - block[0]).abs() * divergence.clamp(min=0)
