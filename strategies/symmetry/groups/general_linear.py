"""Groups that stretch: their elements are not orthogonal, so readers carry the inverse transposes on a role of their own.

    P(d)    a positive number times the identity: a ReLU unit (d = 1), or a head's queries against its keys
    CO(d)   a rotation or reflection and a positive number; CO(1) is every number but zero, for a linear unit
    GL(d)   every invertible map: the inner space of a low-rank adapter, (B, A) -> (B T^-1, T A)

Each has two roles, T and T^-T. Stretching changes norms, so what is maximised has a quadratic part,

    J(T) = sum_roles <T, M> - (tr T H T^T - tr H) / 2        M = A K^T, H = K K^T (anchor A, client K)

which is `(||A||^2 + ||K||^2 - ||A - T K||^2) / 2`: the agreement `<T, M>` again wherever T keeps norms. P(d) has a
closed form up to a quartic, `p a^4 - q a^3 + s a - r = 0` (the rescaling of Zhang et al. 2025, arXiv 2502.00264), CO(d)
alternates it with the polar factor, and GL(d) climbs from the best of rotation and least squares: its J is not
concave. The rotation that aligns adapters is `O(d)`, without a second role (FedRot-LoRA, 2026).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from fedbasin.strategies.symmetry.groups.block_groups import Roles, agreement
from fedbasin.strategies.symmetry.groups.groups import Orthogonal
from fedbasin.strategies.symmetry.groups.scale import best_scale

Maps = Float[Tensor, "*batch size size"]
Stretched = Float[Tensor, "*batch size double"]
"""M and H side by side."""

# Rounds of rotation and scale; more change nothing that is visible.
_ROUNDS = 3

# Beyond this condition number of T, float32 weights lose the digits that the check asks for.
_WORST_CONDITION = 1e3


class IllConditionedError(ValueError):
    """A map too close to a singular one to be undone."""


@dataclass(frozen=True)
class _Stretching(ABC):
    """A group on a space of `size` entries and on its dual.

    Law: no element that its climb has visited, the identity among them, has a larger J than `maximisers`.
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
        """The maps with the largest J."""

    @abstractmethod
    def random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count size size"]:
        """Drawn maps in float64, stretching by at most two either way."""

    def values(self, scores: Roles) -> Float[Tensor, "*batch"]:
        found = zip(self.maximisers(scores), scores, strict=True)
        return torch.stack([agreement(role, score) for role, score in found]).sum(0)

    def maximisers(self, scores: Roles) -> Roles:
        found = self.best(*scores)
        return found, contragredient(found)

    def draw(self, count: int, generator: torch.Generator) -> Roles:
        drawn = self.random(count, generator)
        return drawn, contragredient(drawn)


@dataclass(frozen=True)
class Positive(_Stretching):
    """P(size): one positive number for the whole space."""

    def __str__(self) -> str:
        return f"P({self.size})"

    def best(self, primal: Stretched, dual: Stretched) -> Maps:
        (q, p), (s, r) = _traces(primal), _traces(dual)
        return best_scale(p, q, r, s)[..., None, None] * _eye(self.size)

    def random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count size size"]:
        return _drawn_scales(count, generator)[:, None, None] * _eye(self.size)


@dataclass(frozen=True)
class Conformal(_Stretching):
    """CO(size): one positive number, and a rotation or reflection."""

    def __str__(self) -> str:
        return f"CO({self.size})"

    def best(self, primal: Stretched, dual: Stretched) -> Maps:
        one, other = _scores(primal), _scores(dual)
        # Of a single number both signs are tried, which is all there is; larger rotations agree in their sum.
        starts = (one + other, one, other) if self.size == 1 else (one + other,)
        found = torch.stack([self._climbed(primal, dual, start) for start in starts])
        gains = agreement(found, primal) + agreement(contragredient(found), dual)
        return torch.take_along_dim(found, gains.argmax(0)[None, ..., None, None], 0)[0]

    def random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count size size"]:
        turns = Orthogonal(self.size).inner_random(count, generator)
        return _drawn_scales(count, generator)[:, None, None] * turns

    def _climbed(self, primal: Stretched, dual: Stretched, start: Maps) -> Maps:
        """Rotation and scale in turn, from the rotation that suits `start`."""
        (_, p), (_, r) = _traces(primal), _traces(dual)
        one, other = _scores(primal), _scores(dual)
        polar = Orthogonal(self.size).inner_maximisers
        turn = polar(start)
        for _ in range(_ROUNDS if self.size > 1 else 1):
            q, s = ((turn * score).sum((-2, -1)) for score in (one, other))
            scale = best_scale(p, q, r, s)[..., None, None]
            turned, turn = turn, polar(scale * one + other / scale)
        return scale * turned


@dataclass(frozen=True)
class General(_Stretching):
    """GL(size): every invertible map. Matching takes well-conditioned ones only."""

    def __str__(self) -> str:
        return f"GL({self.size})"

    def best(self, primal: Stretched, dual: Stretched) -> Maps:
        pairs = zip(*(role.reshape(-1, *role.shape[-2:]) for role in (primal, dual)), strict=True)
        found = torch.stack([self._climbed(*pair) for pair in pairs])
        return found.reshape(*primal.shape[:-1], self.size)

    def random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count size size"]:
        left, right = (Orthogonal(self.size).inner_random(count, generator) for _ in range(2))
        scales = _drawn_scales(count * self.size, generator).reshape(count, self.size)
        return left @ torch.diag_embed(scales) @ right

    def _climbed(self, primal: Tensor, dual: Tensor) -> Tensor:
        start = max(self._starts(primal, dual), key=lambda each: _gain(each, primal, dual))
        found = _ascended(start, primal, dual)
        return found if is_well_conditioned(found) else start

    def _starts(self, primal: Tensor, dual: Tensor) -> list[Tensor]:
        """The best rotation with its scale, and each factor's least squares with the other riding along."""
        fitted = (_least_squares(primal), _least_squares(dual))
        riding = (fitted[0], torch.linalg.pinv(fitted[1]).mT)
        conformal = Conformal(self.size).best(primal, dual)
        return [conformal, *(each for each in riding if is_well_conditioned(each))]


def is_well_conditioned(maps: Maps) -> bool:
    """Whether all maps can be undone without losing the weights' digits."""
    return bool((torch.linalg.cond(maps) < _WORST_CONDITION).all())


def contragredient(maps: Maps) -> Maps:
    """The inverse transposes.

    Raises:
        IllConditionedError: a map is singular, or too close to it.
    """
    if maps.shape[-1] == 1:
        return maps.reciprocal()
    if not is_well_conditioned(maps):
        worst = float(torch.linalg.cond(maps).max())
        raise IllConditionedError(
            f"a map of {maps.shape[-1]} dimensions has condition number {worst:.3g}, above "
            f"{_WORST_CONDITION:.0e}; rotate only, with O({maps.shape[-1]})"
        )
    return torch.linalg.inv(maps).mT.contiguous()


def _least_squares(role: Tensor) -> Tensor:
    """The T with `T H = M`, smallest where H has no rank."""
    found: Tensor = torch.linalg.lstsq(_grams(role).mT, _scores(role).mT, driver="gelsd").solution
    return found.mT


def _gain(maps: Tensor, primal: Tensor, dual: Tensor) -> float:
    return float(agreement(maps, primal) + agreement(contragredient(maps), dual))


def _ascended(start: Tensor, primal: Tensor, dual: Tensor) -> Tensor:
    """J climbed by quasi-Newton steps (Broyden, Fletcher, Goldfarb, Shanno) from `start`; it never falls."""
    shape = start.shape

    def falling(entries: np.ndarray) -> tuple[float, np.ndarray]:
        maps = torch.from_numpy(entries).reshape(shape)
        if not is_well_conditioned(maps):
            return np.inf, np.zeros_like(entries)
        inverse = torch.linalg.inv(maps)
        own = _scores(primal) - maps @ _grams(primal)
        other = _scores(dual) - inverse.mT @ _grams(dual)
        slope = own - inverse.mT @ other.mT @ inverse.mT
        return -_gain(maps, primal, dual), -slope.reshape(-1).numpy()

    found = minimize(falling, start.reshape(-1).numpy(), jac=True, method="L-BFGS-B").x
    return torch.from_numpy(found).reshape(shape)


def _scores(role: Stretched) -> Maps:
    return role[..., : role.shape[-2]]


def _grams(role: Stretched) -> Maps:
    return role[..., role.shape[-2] :]


def _traces(role: Stretched) -> tuple[Tensor, Tensor]:
    """The traces of M and of H."""
    halves = (half.diagonal(dim1=-2, dim2=-1).sum(-1) for half in (_scores(role), _grams(role)))
    agreed, squared = halves
    return agreed, squared


def _eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def _drawn_scales(count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Between a half and two, uniformly in the logarithm."""
    return 2 ** (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)
