"""Groups that stretch: their elements are not orthogonal, so readers have a role of their own for inverse transposes.

    P(d)    a positive number times the identity: a ReLU unit (d = 1), or the queries of a head against its keys
    CO(d)   a rotation or reflection times a positive number; CO(1) is any number but zero, for a linear unit
    GL(d)   every invertible map: the inner space of a low-rank adapter, (B, A) -> (B T^-1, T A)

Each group has two roles, T and T^-T. Stretching changes norms, so the objective has a quadratic part,

    J(T) = sum_roles <T, M> - (tr T H T^T - tr H) / 2        M = A K^T, H = K K^T (anchor A, client K)

which is `(||A||^2 + ||K||^2 - ||A - T K||^2) / 2`, and equals `<T, M>` wherever T keeps norms. The maximiser of P(d) is
a root of the quartic `p a^4 - q a^3 + s a - r = 0` (the rescaling of Zhang et al. 2025, arXiv 2502.00264). CO(d)
alternates between this scale and the polar factor. GL(d) ascends from rotations of both determinants and from least
squares, as its J is not concave. The rotations that align adapters are `O(d)`, without a second role (FedRot-LoRA, 2026).
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from fedbasin.strategies.symmetry.groups.block_groups import Inner, Roles, agreement
from fedbasin.strategies.symmetry.groups.groups import Orthogonal
from fedbasin.strategies.symmetry.groups.scale import best_scale

Maps = Float[Tensor, "*batch size size"]
Stretched = Float[Tensor, "*batch size double"]
"""A score: M and H side by side."""

# Rounds of rotation and scale; more rounds do not change the result visibly.
_ROUNDS = 3

# With a larger condition number of T, float32 weights lose the digits that `check` requires.
_WORST_CONDITION = 1e3


class IllConditionedError(ValueError):
    """A map that is too close to a singular map to be inverted."""


@dataclass(frozen=True)
class _Stretching(Inner):
    """A group on a space of `size` entries and on its dual.

    Law: no element visited by the ascent, which includes the identity, has a larger J than `maximisers`.
    """

    size: int

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.size, self.size)

    @property
    def duals(self) -> tuple[int, ...]:
        return (1, 0)

    @abstractmethod
    def best(self, primal: Stretched, dual: Stretched) -> Maps:
        """Return the maps with the largest J."""

    @abstractmethod
    def random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count size size"]:
        """Return drawn maps in float64, whose singular values are between a half and two."""

    def values(self, scores: Roles) -> Float[Tensor, "*batch"]:
        pairs = zip(self.maximisers(scores), scores, strict=True)
        return torch.stack([agreement(role, score) for role, score in pairs]).sum(0)

    def maximisers(self, scores: Roles) -> Roles:
        maps = self.best(*scores)
        return maps, contragredient(maps)

    def draw(self, count: int, generator: torch.Generator) -> Roles:
        drawn = self.random(count, generator)
        return drawn, contragredient(drawn)


@dataclass(frozen=True)
class Positive(_Stretching):
    """P(size): a positive number times the identity."""

    def __str__(self) -> str:
        return f"P({self.size})"

    def best(self, primal: Stretched, dual: Stretched) -> Maps:
        (q, p), (s, r) = _traces(primal), _traces(dual)
        return best_scale(p, q, r, s)[..., None, None] * _eye(self.size)

    def random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count size size"]:
        return _draw_scales(count, generator)[:, None, None] * _eye(self.size)


@dataclass(frozen=True)
class Conformal(_Stretching):
    """CO(size): a positive number times a rotation or reflection."""

    def __str__(self) -> str:
        return f"CO({self.size})"

    def best(self, primal: Stretched, dual: Stretched) -> Maps:
        writers, readers = _scores(primal), _scores(dual)
        # The sign of a single number may be that of either score, so both are tried. A rotation starts from the sum.
        starts = (writers + readers, writers, readers) if self.size == 1 else (writers + readers,)
        maps = torch.stack([self._ascend(primal, dual, start) for start in starts])
        gains = agreement(maps, primal) + agreement(contragredient(maps), dual)
        return torch.take_along_dim(maps, gains.argmax(0)[None, ..., None, None], 0)[0]

    def random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count size size"]:
        rotations = Orthogonal(self.size).inner_random(count, generator)
        return _draw_scales(count, generator)[:, None, None] * rotations

    def _ascend(self, primal: Stretched, dual: Stretched, start: Maps) -> Maps:
        """Maximise over the scale and the rotation alternately, from the polar factor of `start`."""
        (_, p), (_, r) = _traces(primal), _traces(dual)
        writers, readers = _scores(primal), _scores(dual)
        polar = Orthogonal(self.size).inner_maximisers
        next_rotation = polar(start)
        for _ in range(_ROUNDS if self.size > 1 else 1):
            rotation = next_rotation
            q, s = ((rotation * score).sum((-2, -1)) for score in (writers, readers))
            scale = best_scale(p, q, r, s)[..., None, None]
            next_rotation = polar(scale * writers + readers / scale)
        # The last rotation has no scale of its own yet, so the pair before it is returned.
        return scale * rotation


@dataclass(frozen=True)
class General(_Stretching):
    """GL(size): every invertible map, of which matching returns only well-conditioned ones."""

    def __str__(self) -> str:
        return f"GL({self.size})"

    def best(self, primal: Stretched, dual: Stretched) -> Maps:
        pairs = zip(*(role.reshape(-1, *role.shape[-2:]) for role in (primal, dual)), strict=True)
        maps = torch.stack([self._ascend(*pair) for pair in pairs])
        return maps.reshape(*primal.shape[:-1], self.size)

    def random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count size size"]:
        left, right = (Orthogonal(self.size).inner_random(count, generator) for _ in range(2))
        scales = _draw_scales(count * self.size, generator).reshape(count, self.size)
        return left @ torch.diag_embed(scales) @ right

    def _ascend(self, primal: Tensor, dual: Tensor) -> Tensor:
        # J is not concave, so it is maximised from several starts.
        starts = self._starts(primal, dual)
        maxima = [_maximise(start, primal, dual) for start in starts]
        conditioned = [maps for maps in maxima if is_well_conditioned(maps)]
        return max([*conditioned, *starts], key=lambda maps: _gain(maps, primal, dual))

    def _starts(self, primal: Tensor, dual: Tensor) -> list[Tensor]:
        """Return the best scaled rotation, its mirror image, and the well-conditioned least squares of either role."""
        conformal = Conformal(self.size).best(primal, dual)
        fits = (_least_squares(primal), torch.linalg.pinv(_least_squares(dual)).mT)
        # No ascent changes the sign of the determinant, because singular maps lie between.
        return [conformal, _mirror(conformal), *(fit for fit in fits if is_well_conditioned(fit))]


def is_well_conditioned(maps: Maps) -> bool:
    """Return whether all maps can be inverted without losing the digits of the weights."""
    return bool((torch.linalg.cond(maps) < _WORST_CONDITION).all())


def contragredient(maps: Maps) -> Maps:
    """Return the inverse transposes of a batch of maps.

    Raises:
        IllConditionedError: a map is singular or almost singular.
    """
    # Single numbers are the common case and need no decomposition.
    if maps.shape[-1] == 1:
        return maps.reciprocal()
    if not is_well_conditioned(maps):
        worst = float(torch.linalg.cond(maps).max())
        raise IllConditionedError(
            f"a map of {maps.shape[-1]} dimensions has condition number {worst:.3g}, above "
            f"{_WORST_CONDITION:.0e}; allow rotations only, with O({maps.shape[-1]})"
        )
    return torch.linalg.inv(maps).mT.contiguous()


def _least_squares(role: Tensor) -> Tensor:
    """Return the T with `T H = M`, of minimum norm where H is singular."""
    # `gelsd`, because the default driver assumes full rank and a fresh adapter has a factor of zeros.
    solution: Tensor = torch.linalg.lstsq(_grams(role).mT, _scores(role).mT, driver="gelsd").solution
    return solution.mT


def _mirror(maps: Maps) -> Maps:
    """Return the maps with their last left singular vector turned round."""
    left, values, right = torch.linalg.svd(maps)
    signs = torch.ones_like(values)
    signs[..., -1] = -1
    return left @ torch.diag_embed(signs * values) @ right


def _gain(maps: Tensor, primal: Tensor, dual: Tensor) -> float:
    return float(agreement(maps, primal) + agreement(contragredient(maps), dual))


def _maximise(start: Tensor, primal: Tensor, dual: Tensor) -> Tensor:
    """Maximise J by quasi-Newton steps (L-BFGS-B) from `start`, which never decrease it."""
    shape = start.shape

    def objective(entries: np.ndarray) -> tuple[float, np.ndarray]:
        maps = torch.from_numpy(entries).reshape(shape)
        # An infinite value makes L-BFGS-B shorten its step instead of inverting an almost singular map.
        if not is_well_conditioned(maps):
            return np.inf, np.zeros_like(entries)
        inverse = torch.linalg.inv(maps)
        primal_residual = _scores(primal) - maps @ _grams(primal)
        dual_residual = _scores(dual) - inverse.mT @ _grams(dual)
        slope = primal_residual - inverse.mT @ dual_residual.mT @ inverse.mT
        gain = agreement(maps, primal) + agreement(inverse.mT, dual)
        return -float(gain), -slope.reshape(-1).numpy()

    entries = minimize(objective, start.reshape(-1).numpy(), jac=True, method="L-BFGS-B").x
    return torch.from_numpy(entries).reshape(shape)


def _scores(role: Stretched) -> Maps:
    return role[..., : role.shape[-2]]


def _grams(role: Stretched) -> Maps:
    return role[..., role.shape[-2] :]


def _traces(role: Stretched) -> tuple[Tensor, Tensor]:
    """Return the traces of M and of H."""
    scores, grams = (half.diagonal(dim1=-2, dim2=-1).sum(-1) for half in (_scores(role), _grams(role)))
    return scores, grams


def _eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def _draw_scales(count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Draw scales between a half and two, uniformly in the logarithm."""
    # Not more than two: a check in float32 needs maps that are well-conditioned.
    return 2 ** (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)
