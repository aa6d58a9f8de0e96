"""Sums of task vectors, with and without agreement on the sign of each entry.

sum_k w_k d_k        over all models, or over those whose w_k d_k has the sign of the sum
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedbasin.strategies.tensors.pieces import map_pieces, stacked_pieces

Prune = Callable[[Tensor], Tensor]


def add_task_vectors(
    anchor: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    prune: Prune = lambda deltas: deltas,
    *,
    consensus: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Return the anchor plus the scaled sum of pruned task vectors.

    Args:
        anchor: the tensor that the models were fine-tuned from.
        tensors: the models' tensors.
        weights: factor of each task vector; a negative one subtracts it.
        prune: takes a piece of all task vectors, `[models, elements]`, and returns it with entries set to zero.
        consensus: keep of each entry only the parts with the sign of the sum.
        normalize: divide by the sum of the absolute weights of the parts that are kept.
        scale: factor of the sum.
    """
    factors = torch.tensor(weights, dtype=torch.float64)

    def kernel(rows: Tensor) -> Tensor:
        column = factors.to(rows)[:, None]
        return rows[0] + scale * _sum(prune(rows[1:] - rows[0]), column, consensus=consensus, normalize=normalize)

    return map_pieces(kernel, (anchor, *tensors))


def _sum(deltas: Tensor, weights: Tensor, *, consensus: bool, normalize: bool) -> Tensor:
    parts = deltas * weights
    if not consensus:
        divisor = weights.abs().sum() if normalize else torch.ones(())
        return parts.sum(dim=0) / (divisor or 1.0)
    # A sum of zero counts as positive, as in the paper's code.
    agreed = torch.where(parts.sum(dim=0) >= 0, parts > 0, parts < 0)
    total = (parts * agreed).sum(dim=0)
    if not normalize:
        return total
    divisor = (weights.abs() * agreed).sum(dim=0)
    return total / torch.where(divisor == 0, 1.0, divisor)


def magnitudes(anchor: Tensor, tensor: Tensor) -> Callable[[], Iterator[Tensor]]:
    """Return a function that yields the absolute entries of a task vector, piece by piece."""
    return lambda: ((rows[1] - rows[0]).abs_() for rows in stacked_pieces((anchor, tensor)))
