"""TSV-M: the strongest singular directions of each task vector, made orthogonal to those of the others.

    d_k ~ U_k S_k V_k' at a rank of min(shape) / K;    U = polar([U_1 ... U_K]),  V likewise;    sum = U S V'

Gargiulo et al. 2025, arXiv 2412.00081.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedbasin.strategies.fusion.rules.spectral.matrices import merge_matrices

# Singular values below this, relative to the largest, are rounding errors.
_ROUNDING = 1e-6


def task_singular_vectors(
    anchor: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, scale: float
) -> Tensor:
    """Return the anchor plus the task vectors without interference of their singular directions, times `scale`."""

    def decorrelate(deltas: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(deltas, full_matrices=False)
        rank = max(1, values.shape[1] // len(deltas))
        # Directions without a singular value are arbitrary, and must not push away those of another task.
        is_used = (values > _ROUNDING * values[:, :1])[:, :rank]
        lefts = torch.cat(list(left[:, :, :rank] * is_used[:, None]), dim=1)
        rights = torch.cat(list(right[:, :rank] * is_used[:, :, None]))
        return _polar(lefts) * values[:, :rank].reshape(-1) @ _polar(rights)

    return merge_matrices(anchor, tensors, weights, decorrelate, scale)


def _polar(matrix: Tensor) -> Tensor:
    """Return the closest matrix with orthonormal columns or rows, whichever are fewer."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right
