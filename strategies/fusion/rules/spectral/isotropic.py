"""Iso-C: the sum of the task vectors with all its singular values replaced by their mean.

    sum_k d_k = U S V',    t = anchor + lambda mean(S) U V'

Marczak et al. 2025, arXiv 2502.04959.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedbasin.strategies.fusion.rules.spectral.matrices import merge_matrices


def isotropic(anchor: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, scale: float) -> Tensor:
    """Return the anchor plus the isotropic sum of the task vectors, times `scale`."""

    def flatten_spectrum(deltas: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(deltas.sum(dim=0), full_matrices=False)
        return values.mean() * (left @ right)

    return merge_matrices(anchor, tensors, weights, flatten_spectrum, scale)
