"""WUDI: the change that differs least from each task vector on the inputs that this task vector reads.

    minimise  sum_k |(d - d_k) d_k'|^2 / |d_k|^2        over d

The rows of a task vector span the inputs that it was trained on. Cheng et al. 2025, arXiv 2503.08099, descend from the
sum of the task vectors; the minimum has the closed form of RegMean, with `d_k' d_k` in place of the Gram matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedbasin.strategies.fusion.rules.spectral.matrices import merge_matrices

# Directions whose share of the squares is below this are in no task vector.
_ROUNDING = 1e-6


def input_subspaces(anchor: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, scale: float) -> Tensor:
    """Return the anchor plus the minimiser, times `scale`."""

    def solve(deltas: Tensor) -> Tensor:
        sizes = deltas.square().sum(dim=(1, 2), keepdim=True)
        units = deltas / torch.where(sizes == 0, 1.0, sizes).sqrt()
        grams = units.mT @ units
        return (deltas @ grams).sum(dim=0) @ torch.linalg.pinv(grams.sum(dim=0), rtol=_ROUNDING, hermitian=True)

    return merge_matrices(anchor, tensors, weights, solve, scale)
