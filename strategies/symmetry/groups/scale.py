"""The scale that brings two tensors closest to the anchor when one is multiplied and the other divided by it.

    f(a) = a q - a^2 p / 2 + s / a - r / (2 a^2),    f'(a) = 0  <=>  g(a) = p a^4 - q a^3 + s a - r = 0

the quartic of Zhang et al. 2025 (arXiv 2502.00264), solved for a batch of problems.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Scales stay within these bounds, so that weights in half precision keep their digits.
_LEAST, _MOST = 1 / 16, 16.0

# Every other step halves the interval, which leaves 2^-12 of it: enough, as the objective is flat at its maximum.
_STEPS = 24

# Problems solved at a time, few enough to stay in the cache.
_PIECE = 2**14


def best_scale(p: Tensor, q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """Return the scale a in [1/16, 16] with the largest `f(a) = a q - a^2 p / 2 + s / a - r / (2 a^2)`.

    Ties are decided for 1.

    Args:
        p: squared norm of the tensor that is multiplied.
        q: its inner product with the anchor.
        r: squared norm of the tensor that is divided.
        s: its inner product with the anchor.
    """
    pieces = zip(*(values.reshape(-1).split(_PIECE) for values in (p, q, r, s)), strict=True)
    return torch.cat([_best_scale(*piece) for piece in pieces]).reshape(p.shape)


def _best_scale(p: Tensor, q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """Return the best scales of one piece of the batch.

    f rises where `g(a) = p a^4 - q a^3 + s a - r` is negative. g' has at most one root on each side of `q / 2 p`, and
    between these two roots g falls, so a maximum of f is the root of g before the first or the one after the second.
    """

    def rising(a: Tensor) -> Tensor:
        return ((p * a - q) * a * a + s) * a - r

    def slope(a: Tensor) -> Tensor:
        return (4 * p * a - 3 * q) * a * a + s

    def bend(a: Tensor) -> Tensor:
        return (12 * p * a - 6 * q) * a

    least, most = (torch.full_like(p, bound) for bound in (_LEAST, _MOST))
    turning = torch.where(p > 0, q / (2 * p), most).clamp(_LEAST, _MOST)
    low_root = _crossing(lambda a: -slope(a), lambda a: -bend(a), least, turning)
    high_root = _crossing(slope, bend, turning, most)
    maxima = (_crossing(rising, slope, least, low_root), _crossing(rising, slope, high_root, most))
    candidates = torch.stack([torch.ones_like(p), *maxima, least, most])
    gains = candidates * q - candidates**2 * p / 2 + s / candidates - r / candidates**2 / 2
    return torch.take_along_dim(candidates, gains.argmax(0)[None], 0)[0]


def _crossing(
    rising: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], low: Tensor, high: Tensor
) -> Tensor:
    """Return the zero of a function that rises from `low` to `high`, or the end of the interval nearest to it.

    Newton steps alternate with bisection.
    """
    for step in range(_STEPS):
        middle = (low + high) / 2
        if step % 2:
            jump = middle - rising(middle) / slope(middle)
            middle = torch.where((jump > low) & (jump < high), jump, middle)
        above = rising(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return middle
