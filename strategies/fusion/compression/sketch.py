"""Frequent directions: a sketch of a Gram matrix in a few rows, computed from a stream without the square matrix.

    B^T B  <=  C  <=  B^T B + lost . I            lost  <=  ||X - X_r||_F^2 / (rows of B - r)   for every r

When the buffer holds twice as many rows as are kept, all squared singular values are lowered by the first one that is
dropped (Liberty 2013, arXiv 1206.0594; Ghashami, Liberty, Phillips and Woodruff 2016, arXiv 1501.01711). A narrow sketch
would lose most of its energy in this way, so more rows are kept while data is read than are sent. Two sketches are
merged by adding the rows of one to the other. With a bias, rows are centred by their exact mean; pooling two centred
sets adds one row for the difference of their means (Chan, Golub and LeVeque 1979).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.fusion.compression.formats import Pieces
from fedbasin.strategies.tensors.eigenvalues import eigendecompose

# Rows that are kept at least while data is read: 512 bytes for each input.
_LEAST_KEPT = 64


@dataclass(eq=False)
class Sketch:
    """A sketch of the rows that were added, which changes in place.

    Attributes:
        size: number of rows that are sent.
        kept: number of rows that are kept while rows are added, not below `size`.
        bias: True if the last entry of each row is a one.
        rows: buffer of fewer than twice as many rows as are kept.
        lost: bound on the energy that was dropped in any direction while rows were added.
        squares: sum of squares of each input, around its mean.
        total: sum of the rows.
    """

    size: int
    kept: int
    bias: bool
    rows: Float[Tensor, "rows centred"]
    lost: float
    squares: Float[Tensor, " centred"]
    total: Float[Tensor, " inputs"]

    @classmethod
    def zero(cls, size: int, inputs: int, bias: bool, least_kept: int = _LEAST_KEPT) -> "Sketch":
        """Return an empty sketch.

        Args:
            size: number of rows that are sent.
            inputs: number of entries of a row, the one for the bias included.
            bias: True if the last entry of each row is a one.
            least_kept: number of rows that are kept at least while rows are added.
        """
        total = torch.zeros(inputs, dtype=torch.float64)
        squares = torch.zeros(inputs - bias, dtype=torch.float64)
        return cls(size, max(size, least_kept), bias, squares.new_zeros(0, inputs - bias), 0.0, squares, total)

    def add(self, rows: Float[Tensor, "part inputs"]) -> None:
        """Add rows in place."""
        rows = rows.to(self.total)
        # The mean of no rows would be NaN.
        if not len(rows):
            return
        if not self.bias:
            self._append(rows)
        else:
            mean = rows[:, :-1].mean(0)
            difference = self._mean() - mean
            self._append(rows[:, :-1] - mean)
            self._append_means(difference, float(self.total[-1]), len(rows))
        self.total += rows.sum(0)

    def merge(self, other: "Sketch") -> None:
        """Add the rows of another sketch in place."""
        if self.bias:
            counts = float(self.total[-1]), float(other.total[-1])
            self._append_means(self._mean() - other._mean(), *counts)
        # The other's squares are exact; those of its rows lack what it has dropped.
        squares = self.squares + other.squares
        self._append(other.rows)
        self.squares = squares
        self.lost += other.lost
        self.total += other.total

    def finish(self, *, above: bool) -> Pieces:
        """Return the tensors that are sent.

        Args:
            above: True for a matrix that is an upper bound of the Gram matrix, which a fit divides by; False for one
                with the exact diagonal.
        """
        values, principal = self._principal()
        kept, lost = principal[: self.size], self.lost + float(values[self.size : self.size + 1].sum())
        # Padded with zeros, because the form has a fixed number of rows.
        rows = torch.zeros(self.size, self.rows.shape[1], dtype=self.rows.dtype)
        rows[: len(kept)] = kept
        residual = (self.squares - kept.square().sum(0)).clamp(min=0)
        spread = torch.full_like(residual, lost) if above else residual
        pieces = {"values": rows.float(), "spread": spread.float()}
        return pieces | ({"mean": self.total.float()} if self.bias else {})

    def _mean(self) -> Tensor:
        return self.total[:-1] / self.total[-1].clamp(min=1)

    def _append_means(self, difference: Tensor, count: float, other_count: float) -> None:
        if count and other_count:
            weight = count * other_count / (count + other_count)
            self._append(weight**0.5 * difference[None])

    def _append(self, rows: Tensor) -> None:
        self.squares += rows.square().sum(0)
        for part in rows.split(self.kept):
            self.rows = torch.cat([self.rows, part])
            if len(self.rows) >= 2 * self.kept:
                self._shrink()

    def _shrink(self) -> None:
        values, principal = self._principal()
        dropped, values = float(values[self.kept : self.kept + 1].sum()), values[: self.kept]
        factor = ((values - dropped).clamp(min=0) / values.where(values > 0, 1.0)).sqrt()
        self.rows = factor[:, None] * principal[: self.kept]
        self.lost += dropped

    def _principal(self) -> tuple[Tensor, Tensor]:
        """Return the squared singular values of the rows, largest first, and orthogonal rows with the same square."""
        # By the smaller of two squares, several times faster than a singular value decomposition of the rows.
        if len(self.rows) > self.rows.shape[1]:
            values, directions = eigendecompose(self.rows.T @ self.rows)
            values = values.flip(0).clamp(min=0)
            return values, values.sqrt()[:, None] * directions.flip(1).T
        values, vectors = eigendecompose(self.rows @ self.rows.T)
        return values.flip(0).clamp(min=0), vectors.flip(1).T @ self.rows
