"""The scale that brings what is multiplied, and what is divided by it, closest to the anchor.

    f(a) = a q - a^2 p / 2 + s / a - r / (2 a^2),    f'(a) = 0  <=>  g(a) = p a^4 - q a^3 + s a - r = 0

the quartic of Zhang et al. 2025 (arXiv 2502.00264), for many problems at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# A matched scale stays within these bounds, so that half precision keeps its digits.
_LEAST, _MOST = 1 / 16, 16.0

# Steps to a root, every other one of which halves the interval: the maximum is flat, and so is what is left.
_STEPS = 24

# Problems solved at a time, so that they stay in the cache.
_PIECE = 2**14


def best_scale(p: Tensor, q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """The a > 0, within bounds, with the largest `f(a) = a q - a^2 p / 2 + s / a - r / (2 a^2)`; 1 among equals.

    Args:
        p: squared norm of what is multiplied; `q` its inner product with the anchor.
        q: see p.
        r: squared norm of what is divided; `s` its inner product with the anchor.
        s: see r.
    """
    pieces = zip(*(each.reshape(-1).split(_PIECE) for each in (p, q, r, s)), strict=True)
    return torch.cat([_best_scale(*piece) for piece in pieces]).reshape(p.shape)


def _best_scale(p: Tensor, q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """The gain f rises where `g(a) = p a^4 - q a^3 + s a - r` is negative, and g' has a root on each side of `q / 2 p` at most.

    Between them g falls, so a maximum of f is the root of g before them or the one after.
    """

    def rising(a: Tensor) -> Tensor:
        return ((p * a - q) * a * a + s) * a - r

    def slope(a: Tensor) -> Tensor:
        return (4 * p * a - 3 * q) * a * a + s

    def bend(a: Tensor) -> Tensor:
        return (12 * p * a - 6 * q) * a

    least, most = (torch.full_like(p, bound) for bound in (_LEAST, _MOST))
    turning = torch.where(p > 0, q / (2 * p), most).clamp(_LEAST, _MOST)
    first = _crossing(lambda a: -slope(a), lambda a: -bend(a), least, turning)
    second = _crossing(slope, bend, turning, most)
    maxima = (_crossing(rising, slope, least, first), _crossing(rising, slope, second, most))
    candidates = torch.stack([torch.ones_like(p), *maxima, least, most])
    gains = candidates * q - candidates**2 * p / 2 + s / candidates - r / candidates**2 / 2
    return torch.take_along_dim(candidates, gains.argmax(0)[None], 0)[0]


def _crossing(
    rising: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """Where a function that rises from `low` to `high` crosses zero, or the end that is nearer to it.

    Newton's steps and halvings in turn.
    """
    for step in range(_STEPS):
        middle = (low + high) / 2
        if step % 2:
            jump = middle - rising(middle) / slope(middle)
            middle = torch.where((jump > low) & (jump < high), jump, middle)
        above = rising(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return middle
