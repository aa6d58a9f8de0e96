"""Inner groups: the groups that act inside one block, such as a head, an expert or a unit.

Every inner group has an exact maximiser of `<T, M>` for a batch of score matrices, `M[i, j] = <anchor i, client j>`:

    R(n,s)          rotary position codes: entries j and j + s of a block of 2 s rotate together by one angle,
                    phi = atan2(D, C) with C = M[i,i] + M[j,j], D = M[j,i] - M[i,j]. These are the orthogonal
                    maps that commute with every rotation by position (Wang and Wang 2025). s = n / 2 is the
                    half-split layout (Llama, GPT-NeoX), s = 1 the interleaved layout (GPT-J)
    Z(n,s)          one sign for each rotary pair, which is all that a norm between projection and rotation allows
    A+B             A on the first entries, B on the rest: rotary positions on a part of the head

A *role* is one feature space. Elements of inner groups are dense matrices, one for each role.
"""

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import starmap
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

Roles = tuple[Tensor, ...]
Scores = Float[Tensor, "*batch n n"]


class Inner(Protocol):
    """A group that acts on the roles of one block.

    Law: no element has a larger `<T, M>` than `maximisers(scores)`, whose `<T, M>` is `values(scores)`.
    """

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the block on each role."""
        ...

    @property
    def duals(self) -> tuple[int, ...]:
        """For each role the role with the inverse transposes, which is itself where maps are orthogonal."""
        ...

    @property
    def stretches(self) -> bool:
        """True if some elements are not orthogonal, so that they change norms."""
        return any(dual != role for role, dual in enumerate(self.duals))

    @property
    def is_permutation(self) -> bool:
        """True for the symmetric group S(n), whose elements permute single entries and change nothing else."""
        return False

    @property
    def permutes_blocks(self) -> bool:
        """True if whole blocks change places."""
        return False

    @property
    def as_factor(self) -> str:
        """The notation of the group as a factor of a product, in parentheses where these are needed."""
        return str(self)

    def values(self, scores: Roles) -> Float[Tensor, "*batch"]:
        """Return the largest `<T, M>`, summed over the roles, for each member of a batch of scores."""
        ...

    def maximisers(self, scores: Roles) -> Roles:
        """Return the element with the largest `<T, M>`: a matrix for each role and each member of the batch."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> Roles:
        """Return `count` uniformly drawn elements, `[count, width, width]` for each role, in float64."""
        ...


class SingleRole(Inner):
    """An inner group of orthogonal maps on one role; its methods take matrices instead of tuples of matrices."""

    @property
    def duals(self) -> tuple[int, ...]:
        return (0,)

    @abstractmethod
    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        """Return the largest `<T, M>` for each score matrix of a batch."""

    @abstractmethod
    def inner_maximisers(self, scores: Scores) -> Scores:
        """Return the map with the largest `<T, M>` for each score matrix of a batch."""

    @abstractmethod
    def inner_random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n n"]:
        """Return `count` uniformly drawn maps, in float64."""

    def values(self, scores: Roles) -> Float[Tensor, "*batch"]:
        (score,) = scores
        return self.inner_values(score)

    def maximisers(self, scores: Roles) -> Roles:
        (score,) = scores
        return (self.inner_maximisers(score),)

    def draw(self, count: int, generator: torch.Generator) -> Roles:
        return (self.inner_random(count, generator),)


@dataclass(frozen=True)
class _Pairs(SingleRole):
    """A group on pairs of entries that are `stride` apart, in a space of `size` entries."""

    size: int
    stride: int

    def __post_init__(self) -> None:
        if min(self.size, self.stride) < 1 or self.size % (2 * self.stride):
            raise ValueError(
                f"{self.size} entries do not fall into pairs that are {self.stride} apart; "
                "give half the size (half-split) or 1 (interleaved)"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.size,)

    def _split(self) -> tuple[Tensor, Tensor]:
        entries = torch.arange(self.size).reshape(-1, 2, self.stride)
        return entries[:, 0].reshape(-1), entries[:, 1].reshape(-1)

    def _agreement(self, scores: Scores) -> Tensor:
        i, j = self._split()
        return scores[..., i, i] + scores[..., j, j]

    def _matrices(self, cos: Tensor, sin: Tensor) -> Scores:
        i, j = self._split()
        result = cos.new_zeros(*cos.shape[:-1], self.size, self.size)
        result[..., i, i] = result[..., j, j] = cos
        result[..., j, i], result[..., i, j] = sin, -sin
        return result


@dataclass(frozen=True)
class Rotary(_Pairs):
    """R(size, stride): one angle for each rotary pair.

    Pairs are not permuted, because their frequencies differ, and reflections do not commute with rotations.
    """

    def __str__(self) -> str:
        return f"R({self.size},{self.stride})"

    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        return torch.hypot(self._agreement(scores), self._curl(scores)).sum(-1)

    def inner_maximisers(self, scores: Scores) -> Scores:
        # atan2(0, 0) is 0, so a pair without any score is not rotated.
        return self._rotations(torch.atan2(self._curl(scores), self._agreement(scores)))

    def inner_random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n n"]:
        shape = (count, self.size // 2)
        turns = torch.rand(shape, generator=generator, dtype=torch.float64)
        return self._rotations(2 * math.pi * turns)

    def _rotations(self, angles: Float[Tensor, "*batch pairs"]) -> Scores:
        return self._matrices(torch.cos(angles), torch.sin(angles))

    def _curl(self, scores: Scores) -> Tensor:
        i, j = self._split()
        return scores[..., j, i] - scores[..., i, j]


@dataclass(frozen=True)
class PairSigns(_Pairs):
    """Z(size, stride): one sign for each rotary pair."""

    def __str__(self) -> str:
        return f"Z({self.size},{self.stride})"

    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        return self._agreement(scores).abs().sum(-1)

    def inner_maximisers(self, scores: Scores) -> Scores:
        # A pair without any score keeps its sign.
        return self._signs(self._agreement(scores) >= 0)

    def inner_random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n n"]:
        return self._signs(torch.rand(count, self.size // 2, generator=generator) < 0.5)

    def _signs(self, positive: Tensor) -> Scores:
        signs = positive.double() * 2 - 1
        return self._matrices(signs, torch.zeros_like(signs))


@dataclass(frozen=True)
class DirectSum(SingleRole):
    """A+B: one group on the first entries and another on the entries that follow."""

    parts: tuple[Inner, ...]

    def __post_init__(self) -> None:
        if any(len(part.widths) > 1 for part in self.parts):
            raise ValueError(
                f"{self}: every part of a sum has one role; give a group with several roles a block of its own"
            )

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))

    @property
    def widths(self) -> tuple[int, ...]:
        return (sum(part.widths[0] for part in self.parts),)

    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        return torch.stack([part.values((block,)) for part, block in self._blocks(scores)]).sum(0)

    def inner_maximisers(self, scores: Scores) -> Scores:
        result = torch.zeros_like(scores)
        pairs = zip(self._blocks(scores), self._blocks(result), strict=True)
        for (part, block), (_, target) in pairs:
            target.copy_(part.maximisers((block,))[0])
        return result

    def inner_random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n n"]:
        result = torch.zeros(count, *self.widths * 2, dtype=torch.float64)
        for part, target in self._blocks(result):
            target.copy_(part.draw(count, generator)[0])
        return result

    def _blocks(self, matrices: Scores) -> list[tuple[Inner, Tensor]]:
        """Return each part with a view of its diagonal block."""
        result, start = [], 0
        for part in self.parts:
            stop = start + part.widths[0]
            result.append((part, matrices[..., start:stop, start:stop]))
            start = stop
        return result


def widths_of(inners: tuple[Inner, ...]) -> tuple[int, ...]:
    """Return the widths of all roles of a product of inner groups."""
    return tuple(width for inner in inners for width in inner.widths)


def duals_of(inners: tuple[Inner, ...]) -> tuple[int, ...]:
    """Return for each role of a product of inner groups the role with the inverse transposes."""
    result: tuple[int, ...] = ()
    for inner in inners:
        result += tuple(len(result) + dual for dual in inner.duals)
    return result


def agreement(maps: Scores, scores: Tensor) -> Float[Tensor, "*batch"]:
    """Return `<T, M>`, or `<T, M> - (tr T H T^T - tr H) / 2` if the scores are `[M | H]`, as of maps that stretch."""
    size = maps.shape[-1]
    linear = (maps * scores[..., :size]).sum((-2, -1))
    if scores.shape[-1] == size:
        return linear
    grams = scores[..., size:]
    growth = (maps @ grams * maps).sum((-2, -1)) - grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    return linear - growth / 2


def inner_values(inners: tuple[Inner, ...], scores: Iterable[Tensor]) -> Float[Tensor, "*batch"]:
    """Return the largest `<T, M>` of a product of inner groups, each of which has roles of its own.

    The scores may come from a generator: those of one inner group are released before the next are computed.
    """
    return reduce(torch.add, starmap(_values, _by_inner(inners, scores)))


def _values(inner: Inner, scores: Roles) -> Float[Tensor, "*batch"]:
    return inner.values(scores)


def inner_maximisers(inners: tuple[Inner, ...], scores: Roles) -> Roles:
    """Return the maps with the largest `<T, M>` of a product of inner groups, role by role."""
    pairs = _by_inner(inners, scores)
    return tuple(role for inner, roles in pairs for role in inner.maximisers(roles))


def _by_inner(inners: tuple[Inner, ...], scores: Iterable[Tensor]) -> Iterator[tuple[Inner, Roles]]:
    remaining = iter(scores)
    for inner in inners:
        yield inner, tuple(itertools.islice(remaining, len(inner.widths)))
