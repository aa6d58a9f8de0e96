"""Sums of low-rank matrices, stored as two stacked factors that are compressed when they grow too wide.

    sum_k B_k A_k = [B_1 B_2 ...] [A_1; A_2; ...] = L R        L [out, width], R [width, in]

    L = Q_L T_L,  R^T = Q_R T_R,  T_L T_R^T = U S V^T   =>   L R = (Q_L U) S (Q_R V)^T

The dense `[out, in]` matrix is never built. Compression keeps the largest singular values and adds up the norm of the
rest, which bounds the error of the whole sum by the triangle inequality. Source: Brand 2006 (updates of a thin singular
value decomposition), Linear Algebra and its Applications 415.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from fedbasin.strategies.tensors.eigenvalues import eigendecompose

# Singular values below this, relative to the largest, are rounding errors.
_ROUNDING = 1e-12

# Weight of the identity when a rotation is fitted, relative to the data: directions without data are not rotated.
_PRIOR = 1e-9


class Thin(NamedTuple):
    """A thin singular value decomposition."""

    left: Float[Tensor, "out width"]
    values: Float[Tensor, " width"]
    right: Float[Tensor, "width in"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix `left @ right` that is stored as its two factors.

    Attributes:
        left: left factor, `[out, width]`.
        right: right factor, `[width, in]`.
        dropped: bound on the Frobenius norm of the error of all compressions.
    """

    left: Float[Tensor, "out width"]
    right: Float[Tensor, "width in"]
    dropped: float = 0.0

    @classmethod
    def zero(cls, outputs: int, inputs: int) -> "LowRank":
        """Return the zero matrix, with factors of width 0 in double."""
        double = torch.float64
        return cls(torch.zeros(outputs, 0, dtype=double), torch.zeros(0, inputs, dtype=double))

    @property
    def width(self) -> int:
        """The number of columns of the left factor."""
        return self.left.shape[1]

    def plus(self, other: "LowRank", width: int) -> "LowRank":
        """Return the sum of two matrices, compressed to `width` if it is wider than twice that."""
        total = LowRank(
            torch.cat([self.left, other.left], dim=1),
            torch.cat([self.right, other.right]),
            self.dropped + other.dropped,
        )
        # Only beyond twice the width, so that not every addition costs a decomposition.
        return total.compress(width) if total.width > 2 * width else total

    def scaled(self, factor: float) -> "LowRank":
        """Return the matrix times a number."""
        return LowRank(self.left * factor, self.right, self.dropped * abs(factor))

    def decompose(self) -> Thin:
        """Return the thin singular value decomposition."""
        # By a QR decomposition of both factors, which leaves a core of the size of the width.
        left, upper = torch.linalg.qr(self.left)
        right, lower = torch.linalg.qr(self.right.mT)
        u, values, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        return Thin(left @ u, values, v @ right.mT)

    def compress(self, width: int) -> "LowRank":
        """Return the closest matrix of a smaller width."""
        left, values, right = self.decompose()
        error = float(torch.linalg.vector_norm(values[width:]))
        return LowRank(left[:, :width] * values[:width], right[:width], self.dropped + error)

    def closest_on(self, rank: int, weigh: Callable[[Tensor], Tensor]) -> "LowRank":
        """Return the matrix of a rank whose outputs are closest to this one's: the least `tr (X - Y) G (X - Y)^T`.

        Source: reduced-rank regression, Izenman 1975, Journal of Multivariate Analysis 5.

        Args:
            rank: largest rank.
            weigh: multiplies a matrix by the Gram matrix G of the inputs, which is positive definite.
        """
        values, vectors = eigendecompose(weigh(self.right).to(self.right) @ self.right.mT)
        outputs, _, _ = torch.linalg.svd(self.left @ (vectors * values.clamp_min(0).sqrt()), full_matrices=False)
        kept = outputs[:, :rank]
        return LowRank(kept, kept.mT @ self.left @ self.right, self.dropped)

    def balance(self, rank: int) -> "LowRank":
        """Return the closest matrix of a rank, as `U sqrt(S)` and `sqrt(S) V^T`, padded with zeros up to the rank."""
        left, values, right = self.compress(rank).decompose()
        # The root would turn rounding errors of 1e-16 into factors of 1e-8.
        values = values.where(values > _ROUNDING * values.max(), 0.0) if len(values) else values
        missing = max(0, rank - len(values))
        root = values[:rank].sqrt()
        return LowRank(
            pad(left[:, :rank] * root, (0, missing)),
            pad(root[:, None] * right[:rank], (0, 0, 0, missing)),
            self.dropped,
        )

    def align_to(self, anchor: "LowRank") -> "LowRank":
        """Return the matrix with its factors rotated to the anchor's factors, which have the same width.

        The rotation T brings `T right` and `left T^T` closest to the anchor's factors. It fixes signs and order of
        singular values, which are arbitrary in balanced factors.
        """
        agreement = anchor.right @ self.right.mT + anchor.left.mT @ self.left
        size = float(torch.linalg.matrix_norm(agreement)) / max(1, self.width) ** 0.5
        prior = torch.eye(self.width).to(agreement) * (_PRIOR * size)
        u, _, v = torch.linalg.svd(agreement + prior)
        rotation = u @ v
        # Unused directions get zeros on the left and the anchor's rows on the right. With zeros on both sides they
        # would have no gradient and could never learn again.
        idle = rotation[:, torch.linalg.vector_norm(self.left, dim=0) == 0]
        left, right = self.left @ rotation.mT, rotation @ self.right
        return LowRank(left, right + idle @ (idle.mT @ anchor.right), self.dropped)
