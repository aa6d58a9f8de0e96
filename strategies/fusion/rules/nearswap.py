"""Interpolation that is strong where two models are close: each entry moves by at most `t` towards the second model.

    a + min(1, t / |b - a|) (b - a)

Source: alchemonaut 2024, model card of QuartetAnemoi-70B-t0.0001.
"""

from collections.abc import Sequence

from torch import Tensor

from fedbasin.strategies.tensors.pieces import map_pieces


def nearswap(anchor: Tensor, tensors: Sequence[Tensor], _weights: Sequence[float], *, t: float) -> Tensor:
    """Return the anchor with every entry moved by at most `t` towards the other tensor."""
    return map_pieces(lambda rows: rows[0] + (rows[1] - rows[0]).clamp(-t, t), (anchor, *tensors))
