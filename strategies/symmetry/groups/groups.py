"""The groups that can act on a space, each with an exact maximiser of a matching score.

Matching maximises `<T, M>` over a group, where `M[i, j]` is the inner product of unit `i` of the anchor and unit `j` of
the client, summed over all tensors of the space:

    S(n)                 permutations, by linear assignment (Ainsworth et al. 2023, arXiv 2209.04836)
    O(d)^h               a rotation or reflection in each of h heads, by the polar factor (Schönemann 1966; for
                         attention Zhang et al. 2025, arXiv 2502.00264)
    A*B wr S(h)          h blocks that are permuted, each with an element of every inner group, one for each role:
                         assignment of blocks by the maxima of the inner groups, which are in `block_groups.py`.
                         With O(1), a sign, inside these are the signed permutations B(n) = O(1) wr S(n)

The identity prior adds `epsilon ||M|| / sqrt(n)` to the diagonal of M, which is the MAP estimate under a ridge on
`T - I`. It decides ties (dead units, rank-deficient heads) for the identity and changes nothing else. Scores are in
float64 on the CPU, because the prior is smaller than the rounding of float32.
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

# Keeps the prior of a zero score positive, so that the maximiser is the identity.
_NORM_FLOOR = 1e-30


class Group(Inner, Protocol):
    """A group that acts on the roles of a space, as `count` blocks of `sizes[role]` entries.

    Law: `maximiser(scores)` is in the group and no element of the group has a larger `value`.
    """

    @property
    def count(self) -> int:
        """Number of blocks."""
        ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of a block on each role."""
        ...

    @property
    def in_place(self) -> "Group":
        """The subgroup of the elements that permute no blocks."""
        ...

    def identity(self) -> Element:
        """Return the element that changes nothing."""
        ...

    def random(self, generator: torch.Generator) -> Element:
        """Return a uniformly drawn element."""
        ...

    def score(self, anchor: Rows, client: Rows, role: int) -> Tensor:
        """Return one tensor's contribution to M, limited to the entries that the group can use."""
        ...

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        """Return the element with the largest `<T, M>`, where `prior` weighs the identity."""
        ...

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        """Return `<T, M>` of one element."""
        ...


@dataclass(frozen=True)
class Permutation(SingleRole):
    """S(n): the permutations of n units."""

    count: int

    def __str__(self) -> str:
        return f"S({self.count})"

    @property
    def is_permutation(self) -> bool:
        return True

    @property
    def permutes_blocks(self) -> bool:
        return True

    @property
    def in_place(self) -> Group:
        return Wreath((Permutation(1),), self.count).in_place

    @property
    def sizes(self) -> tuple[int, ...]:
        return (1,)

    def identity(self) -> Element:
        return Element(torch.arange(self.count), (None,), (1,))

    def random(self, generator: torch.Generator) -> Element:
        return Element(torch.randperm(self.count, generator=generator), (None,), (1,))

    def score(self, anchor: Rows, client: Rows, role: int) -> Tensor:  # noqa: ARG002 - there is one role
        return anchor @ client.mT

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        (score,) = scores
        # Not `add_prior`: the score may be the largest matrix of the whole search, so it is not copied.
        bonus = prior * float(torch.linalg.vector_norm(score)) / self.count**0.5
        return Element(assign(score, bonus), (None,), (1,))

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        (score,) = scores
        return float(score[torch.arange(self.count), element.order].double().sum())

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.count,)

    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        # S(1) is a role of scales in a product, and is evaluated for every pair of blocks.
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


class Rotations(SingleRole):
    """A group of orthogonal maps of `count` blocks of `size` entries, each of which stays in its place."""

    size: int
    count: int

    @property
    def in_place(self) -> Group:
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.size * self.count,)

    def identity(self) -> Element:
        return self._element(None)

    def random(self, generator: torch.Generator) -> Element:
        return self._element(self.inner_random(self.count, generator))

    def score(self, anchor: Rows, client: Rows, role: int) -> Tensor:  # noqa: ARG002 - there is one role
        return _score_in_place(anchor, client, self.count, self.size)

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        return self._element(self.inner_maximisers(add_prior(scores[0], prior)))

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        return _inner_product(element.blocks[0], scores[0])

    def _element(self, blocks: Float[Tensor, "count n n"] | None) -> Element:
        return Element(torch.arange(self.count), (blocks,), self.sizes)


@dataclass(frozen=True)
class Orthogonal(Rotations):
    """O(size)^count: a rotation or reflection of every block."""

    size: int
    count: int = 1

    def __str__(self) -> str:
        return f"O({self.size})" + (f"^{self.count}" if self.count > 1 else "")

    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        """Return the nuclear norm of each matrix of a batch."""
        # Signed permutations evaluate a sign for every pair of units, for which an SVD would be far too slow.
        if self.size == 1:
            return scores[..., 0, 0].abs()
        return torch.linalg.svdvals(scores).sum(-1)

    def inner_maximisers(self, scores: Scores) -> Scores:
        """Return the polar factor of each matrix of a batch."""
        if self.size == 1:
            return (scores >= 0).to(scores.dtype) * 2 - 1
        return polar(scores)

    def inner_random(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` matrices drawn from the Haar measure, in float64."""
        shape = (count, self.size, self.size)
        q, r = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
        # Without the signs of R the distribution of Q would not be uniform (Mezzadri 2007, math-ph/0609050).
        return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]


@dataclass(frozen=True)
class Wreath(Inner):
    """`inners wr S(count)`: blocks change places, and each carries an element of every inner group.

    A wreath product may itself be an inner group: experts change places, and in each expert its units do.

    Attributes:
        inners: groups inside a block; their roles are the roles of the product, in this order.
        count: number of blocks.

    Raises:
        ValueError: a nested product has elements that are not orthogonal, which is not supported.
    """

    inners: tuple[Inner, ...]
    count: int

    def __post_init__(self) -> None:
        if any(inner.permutes_blocks and inner.stretches for inner in self.inners):
            raise ValueError(f"{self}: only whole blocks stretch; use rotations inside nested blocks")

    def __str__(self) -> str:
        return "*".join(inner.as_factor for inner in self.inners) + f" wr S({self.count})"

    @property
    def as_factor(self) -> str:
        return f"({self})"

    @property
    def permutes_blocks(self) -> bool:
        return True

    @property
    def in_place(self) -> Group:
        return InPlace(self.inners, self.count)

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
        """Return every block of the anchor against every block of the client, `[count, count, size, size]`.

        On a role that stretches the shape is `[count, count, size, 2 size]`: beside M stands the Gram matrix of the
        client's block.
        """
        scores = self._by_block(anchor @ client.mT, self.sizes[role])
        if self.duals[role] == role:
            return scores
        blocks = client.reshape(self.count, self.sizes[role], -1)
        return torch.cat([scores, (blocks @ blocks.mT).expand_as(scores)], dim=-1)

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        # One copy at a time: copies of all roles together would need more memory than the models that are matched.
        order = assign(inner_values(self.inners, (self._with_prior(s, prior) for s in scores)))
        home = torch.arange(self.count)
        matched = tuple(self._with_prior(score, prior)[home, order] for score in scores)
        return self._element(order, inner_maximisers(self.inners, matched))

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        """Return `<T, M>`, less half the increase of the squared norm on roles that stretch."""
        rows = torch.arange(self.count)
        return sum(
            _inner_product(block, score[rows, element.order])
            for block, score in zip(element.blocks, scores, strict=True)
        )

    def values(self, scores: tuple[Tensor, ...]) -> Float[Tensor, "*batch"]:
        pairs = zip(self.maximisers(scores), scores, strict=True)
        return torch.stack([(role * score).sum((-2, -1)) for role, score in pairs]).sum(0)

    def maximisers(self, scores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        batch = scores[0].shape[:-2]
        # One problem after the other, because SciPy solves assignments one at a time.
        flat = [score.reshape(-1, *score.shape[-2:]) for score in scores]
        dense = [self._dense(self._best(item)) for item in zip(*flat, strict=True)]
        return tuple(torch.stack(role).unflatten(0, batch) for role in zip(*dense, strict=True))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        drawn = [self._dense(self.random(generator)) for _ in range(count)]
        return tuple(torch.stack(role) for role in zip(*drawn, strict=True))

    def _element(self, order: Tensor, blocks: tuple[Tensor | None, ...]) -> Element:
        return Element(order, blocks, self.sizes, self.duals)

    def _best(self, scores: tuple[Tensor, ...]) -> Element:
        blocks = (self._by_block(*pair) for pair in zip(scores, self.sizes, strict=True))
        return self.maximiser(tuple(blocks), prior=0.0)

    def _dense(self, element: Element) -> tuple[Tensor, ...]:
        return tuple(
            element.act(torch.eye(width, dtype=torch.float64), 0, role) for role, width in enumerate(self.widths)
        )

    def _by_block(self, matrix: Float[Tensor, "n n"], size: int) -> Tensor:
        return matrix.reshape(self.count, size, self.count, size).permute(0, 2, 1, 3)

    def _with_prior(self, score: Tensor, prior: float) -> Tensor:
        size, width = score.shape[-2:]
        norm = torch.linalg.vector_norm(score).clamp_min(_NORM_FLOOR)
        result, home = score.clone(), torch.arange(self.count)
        # On a role that stretches the Gram matrix gets the prior too, which makes it the ridge on T - I.
        eye = torch.eye(size, dtype=score.dtype).repeat(1, width // size)
        result[home, home] += prior * norm / (self.count * size) ** 0.5 * eye
        return result


class InPlace(Wreath):
    """The subgroup of a wreath product that permutes no blocks, for spaces whose order of blocks is known."""

    @property
    def permutes_blocks(self) -> bool:
        return False

    @property
    def in_place(self) -> Group:
        return self

    def random(self, generator: torch.Generator) -> Element:
        return self._element(torch.arange(self.count), super().random(generator).blocks)

    def score(self, anchor: Rows, client: Rows, role: int) -> Tensor:
        """Return every block of the anchor against the corresponding block of the client, `[count, size, size]`."""
        return _score_in_place(anchor, client, self.count, self.sizes[role])

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        blocks = inner_maximisers(self.inners, tuple(add_prior(score, prior) for score in scores))
        return self._element(torch.arange(self.count), blocks)

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        pairs = zip(element.blocks, scores, strict=True)
        return sum(_inner_product(block, score) for block, score in pairs)


def add_prior(score: Float[Tensor, "*batch n n"], prior: float) -> Float[Tensor, "*batch n n"]:
    """Return a score that prefers the identity by `prior`, relative to the norm of the score."""
    size = score.shape[-1]
    norm = torch.linalg.matrix_norm(score)[..., None, None].clamp_min(_NORM_FLOOR)
    eye = torch.eye(size, dtype=score.dtype)
    return score + prior * norm / size**0.5 * eye


def _score_in_place(anchor: Rows, client: Rows, count: int, size: int) -> Tensor:
    shape = (count, size, -1)
    return torch.bmm(anchor.reshape(shape), client.reshape(shape).mT)


def _inner_product(blocks: Tensor | None, score: Float[Tensor, "count n n"]) -> float:
    if blocks is None:
        size = score.shape[-2]
        return float(score[..., :size].diagonal(dim1=-2, dim2=-1).double().sum())
    return float(agreement(blocks.to(score.dtype), score).double().sum())
