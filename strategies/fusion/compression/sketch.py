"""Frequent directions: a Gram matrix as a few rows, kept while the rows are read, which never makes the square.

    B^T B  <=  C  <=  B^T B + lost . I            lost  <=  ||X - X_r||_F^2 / (rows of B - r)   for every r

Source: Liberty 2013, arXiv 1206.0594; Ghashami, Liberty, Phillips and Woodruff 2016, arXiv 1501.01711. Whenever
twice as many rows as are kept have come, all squared singular values are lowered by that of the first row that
goes. Sketches merge: their rows are read one after the other. Where there is a bias the rows are taken around
their mean, which is exact; two sets of rows with means of their own differ by one row more (Chan, Golub and
LeVeque 1979).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.fusion.compression.formats import Pieces


@dataclass(eq=False)
class Sketch:
    """The sketch of the rows so far; grows in place.

    Attributes:
        size: rows that are kept.
        bias: whether the last of a row's numbers is a one.
        rows: the buffer, at most twice as many.
        lost: what has been taken from every direction, at most.
        squares: sum of the squares of each input, around its mean.
        total: sum of the rows.
    """

    size: int
    bias: bool
    rows: Float[Tensor, "kept own"]
    lost: float
    squares: Float[Tensor, " own"]
    total: Float[Tensor, " inputs"]

    @classmethod
    def zero(cls, size: int, inputs: int, bias: bool) -> "Sketch":
        """Of no rows."""
        own, dtype = inputs - bias, torch.float64
        nothing, none = torch.zeros(own, dtype=dtype), torch.zeros(0, own, dtype=dtype)
        return cls(size, bias, none, 0.0, nothing, torch.zeros(inputs, dtype=dtype))

    def add(self, rows: Float[Tensor, "part inputs"]) -> None:
        """Read rows."""
        rows = rows.to(self.total)
        if not len(rows):
            return
        if not self.bias:
            self._take(rows)
            self.total += rows.sum(0)
            return
        before, after = self._mean(), rows[:, :-1].mean(0)
        self._take(rows[:, :-1] - after)
        self._shift(before - after, float(self.total[-1]), len(rows))
        self.total += rows.sum(0)

    def merge(self, other: "Sketch") -> None:
        """Read what another one has kept."""
        if self.bias:
            own, others = float(self.total[-1]), float(other.total[-1])
            self._shift(self._mean() - other._mean(), own, others)
        squares = self.squares + other.squares
        self._take(other.rows)
        self.squares = squares
        self.lost += other.lost
        self.total += other.total

    def finished(self, *, above: bool) -> Pieces:
        """What is sent.

        Args:
            above: a matrix that is no less than that of the rows, as dividing by it needs; otherwise one that
                has its diagonal.
        """
        self._shrink()
        kept = torch.zeros(self.size, self.rows.shape[1], dtype=self.rows.dtype)
        kept[: len(self.rows)] = self.rows
        left = (self.squares - self.rows.square().sum(0)).clamp(min=0)
        spread = torch.full_like(left, self.lost) if above else left
        pieces = {"values": kept.float(), "spread": spread.float()}
        return pieces | ({"mean": self.total.float()} if self.bias else {})

    def _mean(self) -> Tensor:
        return self.total[:-1] / self.total[-1].clamp(min=1)

    def _shift(self, difference: Tensor, before: float, more: float) -> None:
        if before and more:
            self._take((before * more / (before + more)) ** 0.5 * difference[None])

    def _take(self, rows: Tensor) -> None:
        self.squares += rows.square().sum(0)
        for part in rows.split(self.size):
            self.rows = torch.cat([self.rows, part])
            if len(self.rows) >= 2 * self.size:
                self._shrink()

    def _shrink(self) -> None:
        if len(self.rows) <= self.size:
            return
        # Not the rows' own singular vectors: their Gram matrix is small, and its are found several times faster.
        values, vectors = torch.linalg.eigh(self.rows @ self.rows.T)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        taken = float(values[self.size])
        kept = values[: self.size]
        factor = ((kept - taken).clamp(min=0) / kept.where(kept > 0, 1.0)).sqrt()
        self.rows = factor[:, None] * (vectors[:, : self.size].T @ self.rows)
        self.lost += taken
