"""DARE: drop entries of the task vectors at random and scale up the rest, so that their expectation stays.

    d_k <- m d_k / density,    m ~ Bernoulli(density)

Yu et al. 2024, arXiv 2311.03099. mergekit's `rescale` restores the L1 norm of the tensor instead, which is the same in
expectation.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedbasin.strategies.fusion.rules.task_vectors.consensus import add_task_vectors


def dare(
    anchor: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: Sequence[float],
    seeds: Sequence[int],
    consensus: bool,
    rescale: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Return the anchor plus the sum of randomly pruned task vectors.

    Args:
        anchor: the tensor that the models were fine-tuned from.
        tensors: the models' tensors.
        weights: factor of each task vector.
        density: probability of each task vector's entries to be kept.
        seeds: seed of each model's mask.
        consensus: keep only what has the sign of the sum, as TIES.
        rescale: divide what is kept by the density.
        normalize: divide by the weights.
        scale: factor of the sum (lambda).
    """
    masks = [np.random.Generator(np.random.SFC64(seed)) for seed in seeds]

    def drop(deltas: Tensor) -> Tensor:
        for delta, part, mask in zip(deltas, density, masks, strict=True):
            if part < 1:
                draws = torch.from_numpy(mask.random(len(delta), dtype=np.float32))
                # The comparison writes 0 and 1 in place of the draws, which is faster than a mask.
                delta.mul_(draws.lt_(part))
                if rescale and part > 0:
                    delta.div_(part)
        return deltas

    return add_task_vectors(anchor, tensors, weights, drop, consensus=consensus, normalize=normalize, scale=scale)
