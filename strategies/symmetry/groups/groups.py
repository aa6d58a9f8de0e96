"""The groups: which elements may act on a space, and which of them fits a score best.

Matching maximises `<T, M>` over a group, where `M[i, j]` says how well unit `i` of the anchor agrees with
unit `j` of the client, summed over all tensors of the space. Each group knows its exact maximiser:

    S(n)                 permutations: linear assignment (Ainsworth et al. 2023, arXiv 2209.04836)
    O(d)^h               a rotation or reflection in each of h heads: polar factor (Schönemann 1966; for
                         attention Zhang et al. 2025, arXiv 2502.00264)
    A*B wr S(h)          h blocks that are exchanged, each with its own inner elements, one for each role:
                         assignment over blocks whose entry is the inner maximum; the inner groups are in
                         `inner.py`. With O(1), a sign, inside: the signed permutations B(n) = O(1) wr S(n)

The identity prior adds `epsilon ||M|| / sqrt(n)` to the diagonal of M: the MAP estimate under a ridge on
`T - I`. It decides ties (dead units, rank-deficient heads) for the identity and changes nothing else. Scores
are in float64 on the CPU: the prior is below float32's rounding.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.symmetry.groups.assignment import assign, assign_all
from fedbasin.strategies.symmetry.groups.block_groups import (
    Inner,
    Scores,
    Shared,
    SingleRole,
    agreement,
    duals_of,
    inner_maximisers,
    inner_values,
    widths_of,
)
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.groups.polar import polar

Rows = Float[Tensor, "width features"]

# Keeps a score of zeros at the identity.
_NORM_FLOOR = 1e-30


class Group(Protocol):
    """A closed set of elements on one or more roles.

    Law: `maximiser(scores)` is in the group and no element of it has a larger `value`.
    """

    @property
    def count(self) -> int:
        """Number of blocks that may be exchanged."""
        ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of a block, role by role."""
        ...

    def identity(self) -> Element:
        """The element that changes nothing."""
        ...

    def random(self, generator: torch.Generator) -> Element:
        """A uniformly drawn element."""
        ...

    def score(self, anchor: Rows, client: Rows, role: int) -> Tensor:
        """One tensor's contribution to M, only the parts that the group can use."""
        ...

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        """The element with the largest `<T, M>`."""
        ...

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        """`<T, M>` of one element."""
        ...


@dataclass(frozen=True)
class Permutation(SingleRole):
    """S(n): units change places."""

    count: int

    def __str__(self) -> str:
        return f"S({self.count})"

    @property
    def sizes(self) -> tuple[int, ...]:
        return (1,)

    def identity(self) -> Element:
        return Element(torch.arange(self.count), (None,), (1,))

    def random(self, generator: torch.Generator) -> Element:
        return Element(torch.randperm(self.count, generator=generator), (None,), (1,))

    def score(self, anchor: Rows, client: Rows, role: int) -> Tensor:  # noqa: ARG002 - the one role
        return anchor @ client.mT

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        (score,) = scores
        # Not `with_prior`: a copy of the largest matrix of all would cost more than the prior.
        bonus = prior * float(torch.linalg.vector_norm(score)) / self.count**0.5
        return Element(assign(score, bonus), (None,), (1,))

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        (score,) = scores
        return float(score[torch.arange(self.count), element.order].double().sum())

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.count,)

    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        if self.count == 1:
            return scores.sum((-2, -1))
        return (self.inner_maximisers(scores) * scores).sum((-2, -1))

    def inner_maximisers(self, scores: Scores) -> Scores:
        if self.count == 1:
            return torch.ones_like(scores)
        return torch.eye(self.count, dtype=torch.float64)[assign_all(scores)]

    def inner_random(self, count: int, generator: torch.Generator) -> Tensor:
        eye = torch.eye(self.count, dtype=torch.float64)
        drawn = [eye[torch.randperm(self.count, generator=generator)] for _ in range(count)]
        return torch.stack(drawn)


@dataclass(frozen=True)
class Orthogonal(SingleRole):
    """O(size)^count: every block is turned or reflected by itself, and stays in its place."""

    size: int
    count: int = 1

    def __str__(self) -> str:
        return f"O({self.size})" + (f"^{self.count}" if self.count > 1 else "")

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.size,)

    def identity(self) -> Element:
        return Element(torch.arange(self.count), (None,), self.sizes)

    def random(self, generator: torch.Generator) -> Element:
        blocks = self.inner_random(self.count, generator)
        return Element(torch.arange(self.count), (blocks,), self.sizes)

    def score(self, anchor: Rows, client: Rows, role: int) -> Tensor:  # noqa: ARG002 - the one role
        shape = (self.count, self.size, -1)
        return torch.bmm(anchor.reshape(shape), client.reshape(shape).mT)

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        blocks = self.inner_maximisers(with_prior(scores[0], prior))
        return Element(torch.arange(self.count), (blocks,), self.sizes)

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        return _inner_product(element.blocks[0], scores[0])

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.size * self.count,)

    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        """The nuclear norm of each matrix of a batch."""
        if self.size == 1:
            return scores[..., 0, 0].abs()
        return torch.linalg.svdvals(scores).sum(-1)

    def inner_maximisers(self, scores: Scores) -> Scores:
        """The polar factors."""
        if self.size == 1:
            return (scores >= 0).to(scores.dtype) * 2 - 1
        return polar(scores)

    def inner_random(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` matrices drawn from the Haar measure, in float64."""
        shape = (count, self.size, self.size)
        q, r = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
        return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]


@dataclass(frozen=True)
class Wreath:
    """`inners wr S(count)`: whole blocks change places, each with an element of every inner group.

    A wreath product may itself be an inner group: experts change places, and in each of them its units.

    Attributes:
        inners: the groups inside a block; their roles are the roles of the product, in this order.
        count: number of blocks.

    Raises:
        ValueError: a nested product stretches, which nothing needs yet.
    """

    inners: tuple[Inner, ...]
    count: int

    def __post_init__(self) -> None:
        nested = [inner for inner in self.inners if isinstance(inner, Wreath | Shared)]
        if any(dual != role for inner in nested for role, dual in enumerate(inner.duals)):
            raise ValueError(f"{self}: only whole blocks stretch; rotate inside nested blocks")

    def __str__(self) -> str:
        return "*".join(map(_factor, self.inners)) + f" wr S({self.count})"

    @property
    def sizes(self) -> tuple[int, ...]:
        return widths_of(self.inners)

    @property
    def duals(self) -> tuple[int, ...]:
        return duals_of(self.inners)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.count * size for size in self.sizes)

    def identity(self) -> Element:
        return self._element(torch.arange(self.count), (None,) * len(self.sizes))

    def random(self, generator: torch.Generator) -> Element:
        order = torch.randperm(self.count, generator=generator)
        drawn = (inner.draw(self.count, generator) for inner in self.inners)
        return self._element(order, tuple(role for roles in drawn for role in roles))

    def score(self, anchor: Rows, client: Rows, role: int) -> Tensor:
        """`[count, count, size, size]`: every block of the anchor against every block of the client.

        Where maps stretch `[count, count, size, 2 size]`: and the client's block against itself.
        """
        scores = self._by_block(anchor @ client.mT, self.sizes[role])
        if self.duals[role] == role:
            return scores
        blocks = client.reshape(self.count, self.sizes[role], -1)
        return torch.cat([scores, (blocks @ blocks.mT).expand_as(scores)], dim=-1)

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        # Copies one after the other: together they would need more memory than all that is matched.
        order = assign(inner_values(self.inners, (self._with_prior(s, prior) for s in scores)))
        home = torch.arange(self.count)
        chosen = tuple(self._with_prior(score, prior)[home, order] for score in scores)
        return self._element(order, inner_maximisers(self.inners, chosen))

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        """`<T, M>`; less half the squared norm that is gained, on roles that stretch."""
        rows = torch.arange(self.count)
        return sum(
            _inner_product(block, score[rows, element.order])
            for block, score in zip(element.blocks, scores, strict=True)
        )

    def values(self, scores: tuple[Tensor, ...]) -> Float[Tensor, "*batch"]:
        found = self.maximisers(scores)
        pairs = zip(found, scores, strict=True)
        return torch.stack([(role * score).sum((-2, -1)) for role, score in pairs]).sum(0)

    def maximisers(self, scores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        batch = scores[0].shape[:-2]
        flat = [score.reshape(-1, *score.shape[-2:]) for score in scores]
        found = [self._dense(self._best(each)) for each in zip(*flat, strict=True)]
        return tuple(torch.stack(role).unflatten(0, batch) for role in zip(*found, strict=True))

    @property
    def in_place(self) -> "InPlace":
        """The same without exchanges."""
        return InPlace(self.inners, self.count)

    def _element(self, order: Tensor, blocks: tuple[Tensor | None, ...]) -> Element:
        return Element(order, blocks, self.sizes, self.duals)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        drawn = [self._dense(self.random(generator)) for _ in range(count)]
        return tuple(torch.stack(role) for role in zip(*drawn, strict=True))

    def _best(self, scores: tuple[Tensor, ...]) -> Element:
        blocks = (self._by_block(*pair) for pair in zip(scores, self.sizes, strict=True))
        return self.maximiser(tuple(blocks), prior=0.0)

    def _dense(self, element: Element) -> tuple[Tensor, ...]:
        return tuple(
            element.act(torch.eye(width, dtype=torch.float64), 0, role)
            for role, width in enumerate(self.widths)
        )

    def _by_block(self, matrix: Float[Tensor, "n n"], size: int) -> Tensor:
        return matrix.reshape(self.count, size, self.count, size).permute(0, 2, 1, 3)

    def _with_prior(self, score: Tensor, prior: float) -> Tensor:
        size, width = score.shape[-2:]
        norm = torch.linalg.vector_norm(score).clamp_min(_NORM_FLOOR)
        favoured, home = score.clone(), torch.arange(self.count)
        eye = torch.eye(size, dtype=score.dtype).repeat(1, width // size)
        favoured[home, home] += prior * norm / (self.count * size) ** 0.5 * eye
        return favoured


class InPlace(Wreath):
    """The elements of a wreath product that exchange no blocks: what is left where the order is known."""

    def random(self, generator: torch.Generator) -> Element:
        return self._with(super().random(generator).blocks)

    def score(self, anchor: Rows, client: Rows, role: int) -> Tensor:
        """`[count, size, size]`: every block of the anchor against the same block of the client."""
        shape = (self.count, self.sizes[role], -1)
        return torch.bmm(anchor.reshape(shape), client.reshape(shape).mT)

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        favoured = tuple(with_prior(score, prior) for score in scores)
        return self._with(inner_maximisers(self.inners, favoured))

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        pairs = zip(element.blocks, scores, strict=True)
        return sum(_inner_product(block, score) for block, score in pairs)

    def _with(self, blocks: tuple[Tensor | None, ...]) -> Element:
        return self._element(torch.arange(self.count), blocks)


def signed(count: int, *, scales: bool = False) -> Wreath:
    """The signed permutations `O(1) wr S(count)`, what a root mean square norm leaves of a stream.

    Args:
        count: number of units.
        scales: adds a second role that only follows the order: a norm's weight has no sign.
    """
    return Wreath((Orthogonal(1), Permutation(1)) if scales else (Orthogonal(1),), count)


def gated(count: int) -> Wreath:
    """The hidden units of `down(act(gate(x)) * up(x))`: they change places and, as `up` is linear, signs.

    Roles: 0 is the gate, 1 are up and down.
    """
    return Wreath((Permutation(1), Orthogonal(1)), count)


def _factor(inner: Inner) -> str:
    return f"({inner})" if isinstance(inner, Wreath) else str(inner)


def with_prior(score: Float[Tensor, "*batch n n"], prior: float) -> Float[Tensor, "*batch n n"]:
    """A score that prefers the identity by `prior`, relative to its own size."""
    size = score.shape[-1]
    norm = torch.linalg.matrix_norm(score)[..., None, None].clamp_min(_NORM_FLOOR)
    eye = torch.eye(size, dtype=score.dtype)
    return score + prior * norm / size**0.5 * eye


def _inner_product(blocks: Tensor | None, score: Float[Tensor, "count n n"]) -> float:
    if blocks is None:
        size = score.shape[-2]
        return float(score[..., :size].diagonal(dim1=-2, dim2=-1).double().sum())
    return float(agreement(blocks.to(score.dtype), score).double().sum())
