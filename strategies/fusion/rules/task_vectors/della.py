"""DELLA: drop entries at random, large ones of a row less often, and scale up the rest by their own probability.

    p = density - epsilon + 2 epsilon (rank of |d| in its row) / (columns - 1),    d <- m d / p,    m ~ Bernoulli(p)

Deep, Bhardwaj, Poria 2024, arXiv 2406.11617. mergekit's `rescale` restores the L1 norm of the tensor instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedbasin.strategies.fusion.rules.task_vectors.consensus import add_task_vectors
from fedbasin.strategies.tensors.pieces import map_rows


def della(
    anchor: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: Sequence[float],
    epsilon: Sequence[float],
    seeds: Sequence[int],
    consensus: bool,
    rescale: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Return the anchor plus the sum of task vectors pruned by magnitude and chance.

    Args:
        anchor: the tensor that the models were fine-tuned from.
        tensors: the models' tensors.
        weights: factor of each task vector.
        density: mean probability of each task vector's entries to be kept.
        epsilon: largest difference from that probability.
        seeds: seed of each model's mask.
        consensus: keep only what has the sign of the sum, as TIES.
        rescale: divide what is kept by its probability.
        normalize: divide by the weights.
        scale: factor of the sum (lambda).

    Raises:
        ValueError: a probability would not lie between 0 and 1.
    """
    for part, width in zip(density, epsilon, strict=True):
        if 0 < part < 1 and not 0 < part - width <= part + width < 1:
            raise ValueError(f"density {part} with epsilon {width} gives probabilities outside 0 to 1; lower epsilon")
    masks = [torch.Generator().manual_seed(seed) for seed in seeds]
    pruned = [
        _prune(anchor, tensor, part, width, mask, rescale=rescale)
        for tensor, part, width, mask in zip(tensors, density, epsilon, masks, strict=True)
    ]
    return add_task_vectors(anchor, pruned, weights, consensus=consensus, normalize=normalize, scale=scale)


def _prune(
    anchor: Tensor, tensor: Tensor, density: float, epsilon: float, mask: torch.Generator, *, rescale: bool
) -> Tensor:
    """Return the tensor with a pruned task vector, in the precision of the computation."""
    if density >= 1:
        return tensor
    if density <= 0:
        return anchor

    def kernel(block: Tensor) -> Tensor:
        delta = block[1] - block[0]
        ranks = delta.abs().argsort(dim=1, stable=True).argsort(dim=1)
        # A row of one entry has no ranks to tell apart.
        keep = density - epsilon + 2 * epsilon * ranks.to(delta) / max(1, ranks.shape[1] - 1)
        survivors = torch.bernoulli(keep, generator=mask) * delta
        return block[0] + (survivors / keep if rescale else survivors)

    wide = torch.promote_types(anchor.dtype, torch.float32)
    return map_rows(kernel, (anchor.to(wide), tensor))
