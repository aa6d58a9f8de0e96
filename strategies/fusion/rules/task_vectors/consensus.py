"""Sums of task vectors, with and without agreement on the sign of each entry.

sum_k w_k d_k        over all models, or over those whose w_k d_k has the sign of the sum
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedbasin.strategies.tensors.pieces import map_pieces

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
        prune: takes a piece of all task vectors, `[models, elements]`, which it may overwrite, and returns it with
            entries set to zero.
        consensus: keep of each entry only the parts with the sign of the sum.
        normalize: divide by the sum of the absolute weights of the parts that are kept.
        scale: factor of the sum.
    """
    factors = torch.tensor(weights, dtype=torch.float64)

    def kernel(rows: Tensor) -> Tensor:
        deltas = prune(rows[1:].sub_(rows[0]))
        return _sum(deltas, factors.to(rows), consensus=consensus, normalize=normalize).mul_(scale).add_(rows[0])

    return map_pieces(kernel, (anchor, *tensors))


def _sum(deltas: Tensor, weights: Tensor, *, consensus: bool, normalize: bool) -> Tensor:
    sizes = weights.abs()
    if not consensus:
        total = weights @ deltas
        return total / sizes.sum() if normalize and sizes.any() else total
    parts = deltas.mul_(weights[:, None])
    # Products with ones: torch's sum over the first axis takes twice as long.
    ones = torch.ones_like(weights)
    # A sum of zero counts as positive, as in the paper's code.
    signs = torch.copysign(ones[0], ones @ parts)
    # Signs are multiplied and not masked: torch selects by booleans entry by entry, ten times as slowly.
    agreed = parts.mul_(signs).clamp_(min=0)
    total = (ones @ agreed).mul_(signs)
    return total.div_((sizes @ agreed.sign_()).clamp_(min=torch.finfo(parts.dtype).tiny)) if normalize else total


def magnitude(rows: Tensor) -> Tensor:
    """Return the absolute entries of a task vector from a piece of anchor and model."""
    return (rows[1] - rows[0]).abs_()
