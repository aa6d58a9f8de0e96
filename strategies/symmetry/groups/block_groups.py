"""Groups inside one block: what a wreath product does within a head, an expert or a unit.

Each knows the exact maximiser of `<T, M>` for a batch of score matrices, `M[i, j] = <anchor i, client j>`:

    R(n,s)          rotary position codes: entries j and j + s of a block of 2 s turn together by one angle,
                    phi = atan2(D, C) with C = M[i,i] + M[j,j], D = M[j,i] - M[i,j]: the orthogonal maps that
                    commute with every rotation by position (Wang and Wang 2025). s = n / 2 is the half-split
                    layout (Llama, GPT-NeoX), s = 1 the interleaved one (GPT-J)
    Z(n,s)          the same pairs, but only a sign for each: what a norm between projection and rotation leaves
    A+B             A on the first entries, B on the rest: rotary positions on a part of the head
    (A*B)xS(g)      g heads that share a key and a value head (Ainslie et al. 2023, arXiv 2305.13245)

A *role* is one feature space. Elements are dense matrices, one for each role.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import starmap
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.symmetry.groups.assignment import assign_all

Roles = tuple[Tensor, ...]
Scores = Float[Tensor, "*batch n n"]

# Up to this many heads on one key every order is tried, so that the maximum is the best of all.
_ALL_ORDERS = 3


class Inner(Protocol):
    """A group on the roles of one block.

    Law: no element has a larger `<T, M>` than `maximisers(scores)`, and that is `values(scores)`.
    """

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the block, role by role."""
        ...

    @property
    def duals(self) -> tuple[int, ...]:
        """For each role the role with the inverse transposes: itself where the maps are orthogonal."""
        ...

    def values(self, scores: Roles) -> Float[Tensor, "*batch"]:
        """The largest `<T, M>`, summed over the roles, of each axis of a batch of scores."""
        ...

    def maximisers(self, scores: Roles) -> Roles:
        """The element that attains it: a matrix for each role and each axis of the batch."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> Roles:
        """`count` uniformly drawn elements, `[count, width, width]` for each role, in float64."""
        ...


class SingleRole(ABC):
    """An inner group with one role, of orthogonal maps: matrices instead of tuples of matrices."""

    @property
    def duals(self) -> tuple[int, ...]:
        return (0,)

    @abstractmethod
    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        """The largest `<T, M>` of each matrix of a batch."""

    @abstractmethod
    def inner_maximisers(self, scores: Scores) -> Scores:
        """The matrix that attains it."""

    @abstractmethod
    def inner_random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n n"]:
        """`count` drawn matrices, in float64."""

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
    """Pairs of entries that are `stride` apart, in a space of `size`."""

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

    def _turned(self, angles: Float[Tensor, "*batch pairs"]) -> Scores:
        return self._matrices(torch.cos(angles), torch.sin(angles))

    def _matrices(self, cos: Tensor, sin: Tensor) -> Scores:
        i, j = self._split()
        result = cos.new_zeros(*cos.shape[:-1], self.size, self.size)
        result[..., i, i] = result[..., j, j] = cos
        result[..., j, i], result[..., i, j] = sin, -sin
        return result


@dataclass(frozen=True)
class Rotary(_Pairs):
    """One angle for each rotary pair: no exchange of pairs, as frequencies differ, and no reflection."""

    def __str__(self) -> str:
        return f"R({self.size},{self.stride})"

    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        return torch.hypot(self._agreement(scores), self._curl(scores)).sum(-1)

    def inner_maximisers(self, scores: Scores) -> Scores:
        return self._turned(torch.atan2(self._curl(scores), self._agreement(scores)))

    def inner_random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n n"]:
        shape = (count, self.size // 2)
        turns = torch.rand(shape, generator=generator, dtype=torch.float64)
        return self._turned(2 * math.pi * turns)

    def _curl(self, scores: Scores) -> Tensor:
        i, j = self._split()
        return scores[..., j, i] - scores[..., i, j]


@dataclass(frozen=True)
class PairSigns(_Pairs):
    """One sign for each rotary pair."""

    def __str__(self) -> str:
        return f"Z({self.size},{self.stride})"

    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        return self._agreement(scores).abs().sum(-1)

    def inner_maximisers(self, scores: Scores) -> Scores:
        return self._signed(self._agreement(scores) >= 0)

    def inner_random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n n"]:
        return self._signed(torch.rand(count, self.size // 2, generator=generator) < 0.5)

    def _signed(self, positive: Tensor) -> Scores:
        signs = positive.double() * 2 - 1
        return self._matrices(signs, torch.zeros_like(signs))


@dataclass(frozen=True)
class DirectSum(SingleRole):
    """One group on the first entries, another on those that follow."""

    parts: tuple[Inner, ...]

    def __post_init__(self) -> None:
        if any(len(part.widths) > 1 for part in self.parts):
            raise ValueError(f"{self}: a sum has one role; give groups with several a block each")

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))

    @property
    def widths(self) -> tuple[int, ...]:
        return (sum(part.widths[0] for part in self.parts),)

    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        found = [part.values((own,)) for part, own in self._diagonal(scores)]
        return torch.stack(found).sum(0)

    def inner_maximisers(self, scores: Scores) -> Scores:
        result = torch.zeros_like(scores)
        for (part, own), (_, target) in zip(
            self._diagonal(scores), self._diagonal(result), strict=True
        ):
            target.copy_(part.maximisers((own,))[0])
        return result

    def inner_random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n n"]:
        result = torch.zeros(count, *self.widths * 2, dtype=torch.float64)
        for part, target in self._diagonal(result):
            target.copy_(part.draw(count, generator)[0])
        return result

    def _diagonal(self, matrices: Scores) -> list[tuple[Inner, Tensor]]:
        """Each part with its diagonal block, a view."""
        result, start = [], 0
        for part in self.parts:
            stop = start + part.widths[0]
            result.append((part, matrices[..., start:stop, start:stop]))
            start = stop
        return result


@dataclass(frozen=True)
class Shared:
    """`heads` heads that change places but all carry one element, which they share with a single head.

    Roles: first the single heads of `inners` (key, value), then the heads that share them (query, output).
    The latter carry `P (x) T`: the order of the heads and the one element.

    With more than three heads the order is climbed to, from the identity and from the order that suits the
    best element of the single heads alone, and may be a local maximum.
    """

    inners: tuple[Inner, ...]
    heads: int

    def __str__(self) -> str:
        return f"({'*'.join(map(str, self.inners))})xS({self.heads})"

    @property
    def widths(self) -> tuple[int, ...]:
        single = widths_of(self.inners)
        return (*single, *(self.heads * width for width in single))

    @property
    def duals(self) -> tuple[int, ...]:
        single = duals_of(self.inners)
        return (*single, *(len(single) + dual for dual in single))

    def values(self, scores: Roles) -> Float[Tensor, "*batch"]:
        orders = self._orders(scores)
        return inner_values(self.inners, self._joined(scores, orders))

    def maximisers(self, scores: Roles) -> Roles:
        orders = self._orders(scores)
        return self._dense(inner_maximisers(self.inners, self._joined(scores, orders)), orders)

    def draw(self, count: int, generator: torch.Generator) -> Roles:
        drawn = [torch.randperm(self.heads, generator=generator) for _ in range(count)]
        single = tuple(role for inner in self.inners for role in inner.draw(count, generator))
        return self._dense(single, torch.stack(drawn))

    def _orders(self, scores: Roles) -> Tensor:
        """The best order of the heads, `[*batch, heads]`."""
        few = self.heads <= _ALL_ORDERS
        candidates = torch.stack(self._all(scores) if few else self._climbed(scores))
        found = [inner_values(self.inners, self._joined(scores, order)) for order in candidates]
        # Of equal ones the first is taken, which is the identity.
        best = torch.stack(found).argmax(0)
        return torch.take_along_dim(candidates, best[None, ..., None], 0)[0]

    def _all(self, scores: Roles) -> list[Tensor]:
        batch = scores[0].shape[:-2]
        orders = itertools.permutations(range(self.heads))
        return [torch.tensor(order).expand(*batch, self.heads) for order in orders]

    def _climbed(self, scores: Roles) -> list[Tensor]:
        """Orders that no exchange with the inner elements held, nor the reverse, makes better."""
        home = torch.arange(self.heads).expand(*scores[0].shape[:-2], self.heads)
        single = scores[: len(widths_of(self.inners))]
        start = self._order_under(scores, inner_maximisers(self.inners, single))
        return [self._climb(scores, orders) for orders in (home, start)]

    def _climb(self, scores: Roles, orders: Tensor) -> Tensor:
        for _ in range(self.heads * self.heads):
            elements = inner_maximisers(self.inners, self._joined(scores, orders))
            better = self._order_under(scores, elements)
            if torch.equal(better, orders):
                break
            orders = better
        return orders

    def _order_under(self, scores: Roles, elements: Roles) -> Tensor:
        """The best order of the heads when the element that they share is given."""
        pairs = zip(elements, self._by_head(scores), strict=True)
        gains = [torch.einsum("...ij,...acij->...ac", element, own) for element, own in pairs]
        return assign_all(torch.stack(gains).sum(0))

    def _by_head(self, scores: Roles) -> Roles:
        """The sharing roles as `[*batch, heads, heads, width, width]`: anchor's head by client's."""
        single = widths_of(self.inners)
        shared = scores[len(single) :]
        return tuple(
            score.unflatten(-1, (self.heads, width))
            .unflatten(-3, (self.heads, width))
            .movedim(-2, -3)
            for score, width in zip(shared, single, strict=True)
        )

    def _joined(self, scores: Roles, orders: Tensor) -> Roles:
        """What an element of one head agrees with, when all heads that share it are in this order."""
        picked = orders[..., :, None, None, None]
        return tuple(
            alone + torch.take_along_dim(own, picked, -3).sum((-4, -3))
            for alone, own in zip(scores, self._by_head(scores), strict=False)
        )

    def _dense(self, single: Roles, orders: Tensor) -> Roles:
        places = torch.eye(self.heads, dtype=torch.float64)[orders]
        spread = tuple(
            torch.einsum("...ac,...ij->...aicj", places.to(role.dtype), role)
            .flatten(-4, -3)
            .flatten(-2, -1)
            for role in single
        )
        return (*single, *spread)


def widths_of(inners: tuple[Inner, ...]) -> tuple[int, ...]:
    """The widths of all roles, inner group by inner group."""
    return tuple(width for inner in inners for width in inner.widths)


def duals_of(inners: tuple[Inner, ...]) -> tuple[int, ...]:
    """For each role of all inner groups the role with the inverse transposes."""
    result: tuple[int, ...] = ()
    for inner in inners:
        result += tuple(len(result) + dual for dual in inner.duals)
    return result


def agreement(maps: Scores, scores: Tensor) -> Float[Tensor, "*batch"]:
    """`<T, M>`, or `<T, M> - (tr T H T^T - tr H) / 2` for scores `[M | H]` of maps that stretch."""
    size = maps.shape[-1]
    agreed = (maps * scores[..., :size]).sum((-2, -1))
    if scores.shape[-1] == size:
        return agreed
    grams = scores[..., size:]
    stretched = (maps @ grams * maps).sum((-2, -1)) - grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    return agreed - stretched / 2


def inner_values(inners: tuple[Inner, ...], scores: Iterable[Tensor]) -> Float[Tensor, "*batch"]:
    """The largest `<T, M>` where every inner group has roles of its own; scores are let go one by one."""
    return reduce(torch.add, starmap(_values, _by_inner(inners, scores)))


def _values(inner: Inner, scores: Roles) -> Float[Tensor, "*batch"]:
    return inner.values(scores)


def inner_maximisers(inners: tuple[Inner, ...], scores: Roles) -> Roles:
    """The matrices that attain it, role by role."""
    return tuple(role for inner, own in _by_inner(inners, scores) for role in inner.maximisers(own))


def _by_inner(inners: tuple[Inner, ...], scores: Iterable[Tensor]) -> Iterator[tuple[Inner, Roles]]:
    rest = iter(scores)
    for inner in inners:
        yield inner, tuple(itertools.islice(rest, len(inner.widths)))
