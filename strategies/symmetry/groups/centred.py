"""O(n-1): the rotations and reflections of n entries that keep the vector of ones, and therefore every mean.

    T = 1 1^T / n + B R B^T        R in O(n-1), the columns of B orthonormal and orthogonal to 1

LayerNorm subtracts the mean and divides by a norm, so it commutes with these rotations and with no others. The best
fit to a score M has R = polar(B^T M B) (Schönemann 1966; on residual streams Theus et al. 2025, arXiv 2506.22712).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.symmetry.groups.block_groups import Scores, SingleRole
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Rows, add_prior


@dataclass(frozen=True)
class Centred(SingleRole):
    """C(size): the group O(size - 1) on a space of `size` entries, which keeps their mean."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError("C(1) has no rotations, because one entry is its own mean; give at least 2")

    def __str__(self) -> str:
        return f"C({self.size})"

    @property
    def in_place(self) -> Group:
        return self

    @property
    def count(self) -> int:
        return 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.size,)

    def identity(self) -> Element:
        return Orthogonal(self.size).identity()

    def random(self, generator: torch.Generator) -> Element:
        return self._element(self.inner_random(1, generator))

    def score(self, anchor: Rows, client: Rows, role: int) -> Tensor:
        return Orthogonal(self.size).score(anchor, client, role)

    def maximiser(self, scores: tuple[Tensor, ...], prior: float) -> Element:
        return self._element(self.inner_maximisers(add_prior(scores[0], prior)))

    def value(self, scores: tuple[Tensor, ...], element: Element) -> float:
        return Orthogonal(self.size).value(scores, element)

    def inner_values(self, scores: Scores) -> Float[Tensor, "*batch"]:
        return (self.inner_maximisers(scores) * scores).sum((-2, -1))

    def inner_maximisers(self, scores: Scores) -> Scores:
        basis = _basis(self.size).to(scores)
        return self._extend(Orthogonal(self.size - 1).inner_maximisers(basis.mT @ scores @ basis))

    def inner_random(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n n"]:
        return self._extend(Orthogonal(self.size - 1).inner_random(count, generator))

    def _extend(self, rotations: Scores) -> Scores:
        """Extend maps of the complement of the ones vector to the whole space."""
        basis = _basis(self.size).to(rotations)
        return basis @ rotations @ basis.mT + 1 / self.size

    def _element(self, blocks: Float[Tensor, "1 n n"]) -> Element:
        return Element(torch.arange(1), (blocks,), self.sizes)


# A decomposition of the full width, which every score and every draw of a space needs again.
@lru_cache(maxsize=16)
def _basis(size: int) -> Float[Tensor, "n m"]:
    """Return an orthonormal basis of the complement of the ones vector, as columns, in float64."""
    ones = torch.ones(size, 1, dtype=torch.float64)
    return torch.linalg.qr(ones, mode="complete")[0][:, 1:]
