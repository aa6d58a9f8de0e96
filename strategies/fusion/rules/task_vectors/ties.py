"""TIES: trim each task vector to its largest entries, elect a sign for every entry, and average what agrees.

Yadav et al. 2023, arXiv 2306.01708.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedbasin.strategies.fusion.rules.task_vectors.consensus import add_task_vectors, magnitude
from fedbasin.strategies.tensors.pieces import order_statistics


def ties(
    anchor: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: Sequence[float],
    normalize: bool,
    scale: float,
) -> Tensor:
    """Return the anchor plus the task vectors' consensus.

    Args:
        anchor: the tensor that the models were fine-tuned from.
        tensors: the models' tensors.
        weights: factor of each task vector.
        density: fraction of the entries of each task vector that is kept. Entries equal to the smallest kept one are
            kept too, so that the result does not depend on their order.
        normalize: divide by the weights of the models that agree.
        scale: factor of the sum (lambda).
    """
    floors = [smallest_kept(anchor, tensor, part) for tensor, part in zip(tensors, density, strict=True)]

    def trim(deltas: Tensor) -> Tensor:
        for delta, floor in zip(deltas, floors, strict=True):
            if floor > 0:
                # Keeps what is beyond its bound, which is the number just below the floor.
                torch.hardshrink(delta, _just_below(floor, delta), out=delta)
        return deltas

    return add_task_vectors(anchor, tensors, weights, trim, consensus=True, normalize=normalize, scale=scale)


def _just_below(floor: float, like: Tensor) -> float:
    return float(torch.nextafter(torch.tensor(floor, dtype=like.dtype), torch.zeros((), dtype=like.dtype)))


def smallest_kept(anchor: Tensor, tensor: Tensor, density: float) -> float:
    """Return the smallest magnitude among the largest entries of a task vector that make up a fraction of it."""
    count = anchor.numel()
    if density >= 1 or not count:
        return 0.0
    if density <= 0:
        return torch.inf
    (floor,) = order_statistics(magnitude, (anchor, tensor), [count - max(1, int(density * count))])
    return floor
