"""RAM: what one model alone changed is added, what several changed is averaged.

    t = anchor + sum_k l_k d_k [alone] + mean of d_k [several],    changed where |d_k| > epsilon
    l_k = 1 + r min(shared_k / alone_k, alpha)                     number of entries that model k changed

Yuan et al. 2026 (Reinforced Agent Merging), arXiv 2601.13572, for fine-tunings whose changes are sparse. The ratio is
that of each tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedbasin.strategies.tensors.pieces import map_pieces, stacked_pieces


def ram(
    anchor: Tensor, tensors: Sequence[Tensor], _weights: Sequence[float], *, epsilon: float, r: float, alpha: float
) -> Tensor:
    """Return the anchor plus all changes; `r` of 0 does not strengthen the changes of one model alone."""
    alone = torch.zeros(len(tensors), dtype=torch.float64)
    shared = torch.zeros(len(tensors), dtype=torch.float64)
    for rows in stacked_pieces((anchor, *tensors)):
        changed = (rows[1:] - rows[0]).abs() > epsilon
        is_shared = changed.sum(dim=0) > 1
        alone += (changed & ~is_shared).sum(dim=1)
        shared += (changed & is_shared).sum(dim=1)
    strengths = 1 + r * (shared / alone.clamp(min=epsilon)).clamp(0, alpha)

    def kernel(rows: Tensor) -> Tensor:
        deltas = rows[1:] - rows[0]
        deltas *= deltas.abs() > epsilon
        count = deltas.count_nonzero(dim=0)
        lone = strengths.to(rows) @ deltas
        return rows[0] + torch.where(count > 1, deltas.sum(dim=0) / count.clamp(min=1), lone)

    return map_pieces(kernel, (anchor, *tensors))
