"""O(n-1): the rotations and reflections of n entries that keep the vector of ones, and therefore every mean.

    T = 1 1^T / n + B R B^T        R in O(n-1), the columns of B orthonormal and orthogonal to 1

LayerNorm subtracts the mean and divides by a norm, so it commutes with these rotations and with no others. The best
fit to a score M has R = polar(B^T M B) (Schönemann 1966; on residual streams Theus et al. 2025, arXiv 2506.22712).
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.symmetry.groups.block_groups import Scores
from fedbasin.strategies.symmetry.groups.groups import Orthogonal, Rotations


@dataclass(frozen=True)
class Centred(Rotations):
    """C(size): the group O(size - 1) on a space of `size` entries, which keeps their mean."""

    size: int
    count: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError("C(1) has no rotations, because one entry is its own mean; give at least 2")

    def __str__(self) -> str:
        return f"C({self.size})"

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


# A decomposition of the full width, which every score and every draw of a space needs again.
@lru_cache(maxsize=16)
def _basis(size: int) -> Float[Tensor, "n m"]:
    """Return an orthonormal basis of the complement of the ones vector, as columns, in float64."""
    ones = torch.ones(size, 1, dtype=torch.float64)
    return torch.linalg.qr(ones, mode="complete")[0][:, 1:]
