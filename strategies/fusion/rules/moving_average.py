"""The exponential moving average over checkpoints in the order of training.

    m_1 = t_1,    m_k = decay m_{k-1} + (1 - decay) t_k

Polyak and Juditsky 1992, SIAM Journal on Control and Optimization 30; of networks Tarvainen and Valpola 2017, arXiv
1703.01780.
"""

from collections.abc import Sequence

from torch import Tensor

from fedbasin.strategies.fusion.rules.span import combine, normalised


def moving_average(
    _anchor: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, decay: float
) -> Tensor:
    """Return the moving average at the last tensor; weights scale the part of each."""
    last = len(tensors) - 1
    parts = [decay ** (last - k) * (1.0 if k == 0 else 1 - decay) for k in range(len(tensors))]
    return combine(None, tensors, normalised([w * part for w, part in zip(weights, parts, strict=True)]))
