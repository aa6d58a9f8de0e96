"""Breadcrumbs: drop the largest entries of each task vector as outliers, and the smallest as noise.

Davari and Belilovsky 2024, arXiv 2312.06795.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedbasin.strategies.fusion.rules.task_vectors.consensus import add_task_vectors, magnitude
from fedbasin.strategies.tensors.pieces import order_statistics


def breadcrumbs(
    anchor: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: Sequence[float],
    gamma: Sequence[float],
    consensus: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Return the anchor plus the sum of task vectors without their extreme entries.

    Args:
        anchor: the tensor that the models were fine-tuned from.
        tensors: the models' tensors.
        weights: factor of each task vector.
        density: fraction of the entries of each task vector that is kept.
        gamma: fraction of its largest entries that is dropped, as far as the density allows.
        consensus: keep only what has the sign of the sum, as TIES.
        normalize: divide by the weights.
        scale: factor of the sum (lambda).
    """
    bounds = [_bounds(anchor, tensor, *parts) for tensor, *parts in zip(tensors, density, gamma, strict=True)]

    def trim(deltas: Tensor) -> Tensor:
        for delta, (low, high) in zip(deltas, bounds, strict=True):
            sizes = delta.abs()
            delta.mul_(sizes.ge(low).logical_and_(sizes <= high))
        return deltas

    return add_task_vectors(anchor, tensors, weights, trim, consensus=consensus, normalize=normalize, scale=scale)


def _bounds(anchor: Tensor, tensor: Tensor, density: float, gamma: float) -> tuple[float, float]:
    """Return the smallest and the largest magnitude of a task vector that are kept."""
    count = anchor.numel()
    quota = int(density * count)
    if density >= 1:
        return 0.0, torch.inf
    if not quota:
        return torch.inf, 0.0
    lowest = max(0, count - quota - int(gamma * count))
    low, high = order_statistics(magnitude, (anchor, tensor), [lowest, lowest + quota - 1])
    return low, high
