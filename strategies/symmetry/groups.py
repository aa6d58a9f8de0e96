"""The groups: which elements may act on a site, and which of them fits a score best.

Matching maximises `<T, M>` over a group, where `M[i, j]` says how well unit `i` of the anchor agrees with
unit `j` of the client, summed over all tensors of the site. Each group knows its exact maximiser:

    S(n)                 permutations: linear assignment (Ainsworth et al. 2023, arXiv 2209.04836)
    O(d)^h               a rotation or reflection in each of h heads: polar factor (Schönemann 1966; for
                         attention Zhang et al. 2025, arXiv 2502.00264)
    A*B wr S(h)          h blocks that are exchanged, each with its own inner elements, one for each leg:
                         assignment over blocks whose entry is the inner maximum

The identity prior adds `epsilon ||M|| / sqrt(n)` to the diagonal of M: the MAP estimate under a ridge on
`T - I`. It decides ties (dead units, rank-deficient heads) for the identity and changes nothing else. Scores
are in float64 on the CPU: the prior is below float32's rounding.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedbasin.strategies.symmetry.element import Element

Rows = Float[Tensor, "width features"]

# Keeps a score of zeros at the identity.
_NORM_FLOOR = 1e-30


class Group(Protocol):
    """A closed set of elements on one or more legs.

    Law: `maximiser(scores)` is in the group and no element of it has a larger `value`.
    """

    @property
    def count(self) -> int:
        """Number of blocks that may be exchanged."""
        ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of a block, leg by leg."""
        ...

    def identity(self) -> Element:
        """The element that changes nothing."""
        ...

    def random(self, generator: torch.Generator) -> Element:
        """A uniformly drawn element."""
        ...

    def score(self, anchor: Rows, client: Rows, leg: int) -> Tensor:
        """One tensor's contribution to M, only the parts that the group can use."""
        ...

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        """The element with the largest `<T, M>`."""
        ...

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        """`<T, M>` of one element."""
        ...


@dataclass(frozen=True)
class Permutation:
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

    def score(self, anchor: Rows, client: Rows, leg: int) -> Tensor:  # noqa: ARG002 - the one leg
        return anchor @ client.mT

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        return Element(assign(_with_prior(scores[0], prior)), (None,), (1,))

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        (score,) = scores
        return float(score[torch.arange(self.count), element.order].double().sum())

    def inner_values(self, scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """The largest `<T, M>` of each matrix of a batch."""
        return (self.inner_maximisers(scores) * scores).sum((-2, -1))

    def inner_maximisers(self, scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
        """The permutation matrix that attains it, in float64."""
        flat = scores.reshape(-1, self.count, self.count)
        eye = torch.eye(self.count, dtype=torch.float64)
        return torch.stack([eye[assign(score)] for score in flat]).reshape(scores.shape)

    def inner_random(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` drawn permutation matrices."""
        eye = torch.eye(self.count, dtype=torch.float64)
        drawn = [eye[torch.randperm(self.count, generator=generator)] for _ in range(count)]
        return torch.stack(drawn)


@dataclass(frozen=True)
class Orthogonal:
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

    def score(self, anchor: Rows, client: Rows, leg: int) -> Tensor:  # noqa: ARG002 - the one leg
        shape = (self.count, self.size, -1)
        return torch.bmm(anchor.reshape(shape), client.reshape(shape).mT)

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        blocks = self.inner_maximisers(_with_prior(scores[0], prior))
        return Element(torch.arange(self.count), (blocks,), self.sizes)

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        return _inner_product(element.blocks[0], scores[0])

    def inner_values(self, scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """The largest `<T, M>` of each matrix of a batch: its nuclear norm."""
        return torch.linalg.svdvals(scores).sum(-1)

    def inner_maximisers(self, scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
        """The orthogonal matrix that attains it: the polar factor."""
        left, _, right = torch.linalg.svd(scores)
        return left @ right

    def inner_random(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` matrices drawn from the Haar measure, in float64."""
        shape = (count, self.size, self.size)
        q, r = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
        return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]


@dataclass(frozen=True)
class Wreath:
    """`inner wr S(count)`: whole blocks change places, each with one inner element for every leg.

    Attributes:
        inners: the group inside a block, leg by leg; an `Orthogonal` of one block.
        count: number of blocks.
    """

    inners: tuple[Permutation | Orthogonal, ...]
    count: int

    def __str__(self) -> str:
        return "*".join(map(str, self.inners)) + f" wr S({self.count})"

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(_width(inner) for inner in self.inners)

    def identity(self) -> Element:
        return Element(torch.arange(self.count), (None,) * len(self.inners), self.sizes)

    def random(self, generator: torch.Generator) -> Element:
        order = torch.randperm(self.count, generator=generator)
        blocks = tuple(inner.inner_random(self.count, generator) for inner in self.inners)
        return Element(order, blocks, self.sizes)

    def score(self, anchor: Rows, client: Rows, leg: int) -> Tensor:
        """`[count, count, size, size]`: every block of the anchor against every block of the client."""
        size = self.sizes[leg]
        matrix = (anchor @ client.mT).reshape(self.count, size, self.count, size)
        return matrix.permute(0, 2, 1, 3)

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        favoured = [self._with_prior(score, prior) for score in scores]
        values = sum(
            inner.inner_values(score) for inner, score in zip(self.inners, favoured, strict=True)
        )
        order = assign(torch.as_tensor(values))
        chosen = [score[torch.arange(self.count), order] for score in favoured]
        blocks = tuple(
            inner.inner_maximisers(score) for inner, score in zip(self.inners, chosen, strict=True)
        )
        return Element(order, blocks, self.sizes)

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        rows = torch.arange(self.count)
        return sum(
            _inner_product(block, score[rows, element.order])
            for block, score in zip(element.blocks, scores, strict=True)
        )

    def _with_prior(self, score: Tensor, prior: float) -> Tensor:
        size = score.shape[-1]
        norm = torch.linalg.vector_norm(score).clamp_min(_NORM_FLOOR)
        home = torch.eye(self.count, dtype=score.dtype)[:, :, None, None]
        eye = torch.eye(size, dtype=score.dtype)
        return score + prior * norm / (self.count * size) ** 0.5 * home * eye


def assign(score: Float[Tensor, "n n"]) -> Tensor:
    """The order that maximises `sum_i score[i, order[i]]`: the linear assignment problem."""
    columns = linear_sum_assignment(score.detach().cpu().numpy(), maximize=True)[1]
    return torch.from_numpy(columns.astype(np.int64))


def _with_prior(score: Float[Tensor, "*batch n n"], prior: float) -> Float[Tensor, "*batch n n"]:
    size = score.shape[-1]
    norm = torch.linalg.matrix_norm(score)[..., None, None].clamp_min(_NORM_FLOOR)
    eye = torch.eye(size, dtype=score.dtype)
    return score + prior * norm / size**0.5 * eye


def _inner_product(blocks: Tensor | None, score: Float[Tensor, "count n n"]) -> float:
    if blocks is None:
        return float(score.diagonal(dim1=-2, dim2=-1).double().sum())
    return float((blocks.to(score.dtype) * score).double().sum())


def _width(inner: Permutation | Orthogonal) -> int:
    return inner.count if isinstance(inner, Permutation) else inner.size
