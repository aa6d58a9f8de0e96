"""A sum of low-rank matrices, kept as two stacked factors that are compressed as they grow.

    sum_k B_k A_k = [B_1 B_2 ...] [A_1; A_2; ...] = L R        L [out, width], R [width, in]

    L = Q_L T_L,  R^T = Q_R T_R,  T_L T_R^T = U S V^T   =>   L R = (Q_L U) S (Q_R V)^T

The dense `[out, in]` is never made. Compression keeps the largest singular values; what it drops is counted, and the
triangle inequality makes the count a bound on the error of the whole sum. Source: Brand 2006 (updates of a thin
singular value decomposition), Linear Algebra and its Applications 415.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

# Singular values below this, relative to the largest, are rounding.
_ROUNDING = 1e-12

# Weight of the identity in a rotation, relative to what decides it: directions without a say stay.
_PRIOR = 1e-9


class Thin(NamedTuple):
    """A thin singular value decomposition."""

    left: Float[Tensor, "out width"]
    values: Float[Tensor, " width"]
    right: Float[Tensor, "width in"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix `left @ right`.

    Attributes:
        left: its columns, `[out, width]`.
        right: its rows, `[width, in]`.
        dropped: bound on the Frobenius norm of what compressions have left out.
    """

    left: Float[Tensor, "out width"]
    right: Float[Tensor, "width in"]
    dropped: float = 0.0

    @classmethod
    def zero(cls, outputs: int, inputs: int) -> "LowRank":
        """The matrix of zeros, of width 0, in double."""
        double = torch.float64
        return cls(torch.zeros(outputs, 0, dtype=double), torch.zeros(0, inputs, dtype=double))

    @property
    def width(self) -> int:
        """Columns of the left factor."""
        return self.left.shape[1]

    def plus(self, other: "LowRank", width: int) -> "LowRank":
        """The sum; compressed to `width` once it is wider than twice that."""
        total = LowRank(
            torch.cat([self.left, other.left], dim=1),
            torch.cat([self.right, other.right]),
            self.dropped + other.dropped,
        )
        return total.compressed(width) if total.width > 2 * width else total

    def scaled(self, factor: float) -> "LowRank":
        """The matrix times a number."""
        return LowRank(self.left * factor, self.right, self.dropped * abs(factor))

    def decomposed(self) -> Thin:
        """Its singular values, and the vectors of them."""
        left, upper = torch.linalg.qr(self.left)
        right, lower = torch.linalg.qr(self.right.mT)
        u, values, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        return Thin(left @ u, values, v @ right.mT)

    def compressed(self, width: int) -> "LowRank":
        """The closest matrix of this width."""
        left, values, right = self.decomposed()
        kept = values[:width]
        lost = float(torch.linalg.vector_norm(values[width:]))
        return LowRank(left[:, :width] * kept, right[:width], self.dropped + lost)

    def balanced(self, rank: int) -> "LowRank":
        """The closest matrix of a rank, as `U sqrt(S)` and `sqrt(S) V^T`; with zeros where there are fewer values."""
        left, values, right = self.compressed(rank).decomposed()
        values = values.where(values > _ROUNDING * values.max(), 0.0) if len(values) else values
        missing = max(0, rank - len(values))
        root = values[:rank].sqrt()
        return LowRank(
            pad(left[:, :rank] * root, (0, missing)),
            pad(root[:, None] * right[:rank], (0, 0, 0, missing)),
            self.dropped,
        )

    def facing(self, anchor: "LowRank") -> "LowRank":
        """The same matrix with its factors turned to the anchor's, of the same width.

        The rotation T that brings `T right` and `left T^T` closest to the anchor's factors; both are balanced up to a
        rotation, so that neither signs nor the order of singular values are left to chance. Directions that the matrix
        does not use have zeros on the left and the anchor's own rows on the right: with zeros on both sides they
        would have no gradient, and never learn again.
        """
        agreement = anchor.right @ self.right.mT + anchor.left.mT @ self.left
        size = float(torch.linalg.matrix_norm(agreement)) / max(1, self.width) ** 0.5
        prior = torch.eye(self.width).to(agreement) * (_PRIOR * size)
        u, _, v = torch.linalg.svd(agreement + prior)
        turn = u @ v
        idle = turn[:, torch.linalg.vector_norm(self.left, dim=0) == 0]
        left, right = self.left @ turn.mT, turn @ self.right
        return LowRank(left, right + idle @ (idle.mT @ anchor.right), self.dropped)
