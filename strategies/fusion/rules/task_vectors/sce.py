"""SCE: select entries that vary between the models, calculate a weight for each model, erase minority signs.

    w_k = |d_k|^2 / sum_j |d_j|^2        of the selected entries of the task vectors

Wan et al. 2024 (FuseChat), arXiv 2408.07990.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedbasin.strategies.tensors.pieces import map_pieces, order_statistics, stacked_pieces


def sce(anchor: Tensor, tensors: Sequence[Tensor], _weights: Sequence[float], *, select_topk: float) -> Tensor:
    """Return the anchor plus the consensus of the selected entries.

    Args:
        anchor: the tensor that the models were fine-tuned from.
        tensors: the models' tensors.
        select_topk: fraction of the entries that vary which is kept: those of the largest variance.
    """
    floor = _smallest_variance(anchor, tensors, select_topk)

    def select(deltas: Tensor) -> Tensor:
        return deltas if floor == 0 else deltas * (deltas.var(dim=0, correction=0) >= floor)

    sizes = torch.zeros(len(tensors), dtype=torch.float64)
    for deltas in _deltas(anchor, tensors):
        sizes += select(deltas).double().square().sum(dim=1)

    def kernel(rows: Tensor) -> Tensor:
        deltas = select(rows[1:] - rows[0])
        # The majority is counted before weighting, a sum of zero as positive.
        agreed = torch.where(deltas.sum(dim=0) >= 0, deltas > 0, deltas < 0)
        weights = sizes.to(rows)[:, None] * agreed
        total = weights.sum(dim=0)
        return rows[0] + (weights * deltas).sum(dim=0) / torch.where(total == 0, 1.0, total)

    # Relative to the largest, because squares of small changes underflow in single precision.
    sizes /= sizes.max().clamp(min=torch.finfo(sizes.dtype).tiny)
    return map_pieces(kernel, (anchor, *tensors))


def _deltas(anchor: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    return (rows[1:] - rows[0] for rows in stacked_pieces((anchor, *tensors)))


def _smallest_variance(anchor: Tensor, tensors: Sequence[Tensor], part: float) -> float:
    """Return the smallest variance of the entries that are kept; infinity if none is."""
    if part >= 1:
        return 0.0

    def variance(rows: Tensor) -> Tensor:
        return (rows[1:] - rows[0]).var(dim=0, correction=0)

    varying = sum(int(variance(rows).count_nonzero()) for rows in stacked_pieces((anchor, *tensors)))
    quota = int(varying * part)
    if not quota:
        return torch.inf
    (floor,) = order_statistics(variance, (anchor, *tensors), [anchor.numel() - quota])
    return floor
