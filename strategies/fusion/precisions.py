"""Precisions: positive semi-definite maps Lambda by which the clients' weights are averaged.

    theta* = (sum_k Lambda_k)^-1  sum_k Lambda_k . theta_k

    Scalar(n)      n examples                              FedAvg   (McMahan et al. 2017, arXiv 1602.05629)
    Diagonal(F)    diagonal Fisher information             Fisher   (Matena and Raffel 2022, arXiv 2111.09832)
    Gram(X^T X)    second moments of a layer's inputs      RegMean  (Jin et al. 2023, arXiv 2212.09849)
    Sketched(S, d) a Gram matrix S^T S + diag(d)           solved by the identity of Woodbury 1950

Laws: `p.solve(p.weigh(theta)) = theta` for a positive definite p; addition is commutative and associative.

Layers that read the same inputs share one Gram matrix object, which is summed and factorised once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Key = TypeVar("Key")


class SingularSumError(ValueError):
    """A sum of precisions that is singular: no client's statistics determine the weights in some direction."""

    def __init__(self) -> None:
        super().__init__("the sum of the clients' precisions is singular; fuse with a ridge (regulariser) above zero")


class Precision(Protocol):
    """A symmetric positive semi-definite map on one block of weights."""

    def weigh(self, theta: Tensor) -> Tensor:
        """Return `Lambda . theta`, the cross-moment that a client adds."""
        ...

    def solve(self, cross_moment: Tensor) -> Tensor:
        """Return the weights `Lambda^-1 . cross_moment`.

        Raises:
            SingularSumError: the precision is not positive definite.
        """
        ...

    def __add__(self, other: Self) -> "Precision":
        """Return the sum of two precisions."""
        ...

    def scaled(self, factor: float) -> Self:
        """Return `factor . Lambda`."""
        ...

    def isotropic(self, strength: float) -> "Scalar":
        """Return a ridge: `strength` times the mean of the diagonal, equal for every weight."""
        ...


@dataclass(frozen=True)
class Scalar:
    """A precision that is equal for every weight, as the number of examples in FedAvg."""

    weight: float

    def weigh(self, theta: Tensor) -> Tensor:
        return theta * self.weight

    def solve(self, cross_moment: Tensor) -> Tensor:
        return cross_moment / self.weight

    def __add__(self, other: Self) -> "Scalar":
        return Scalar(self.weight + other.weight)

    def scaled(self, factor: float) -> "Scalar":
        return Scalar(self.weight * factor)

    def isotropic(self, strength: float) -> "Scalar":
        return Scalar(self.weight * strength)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A diagonal precision, with one value for each weight of the block."""

    values: Float[Tensor, "..."]

    def weigh(self, theta: Tensor) -> Tensor:
        return theta * self.values.reshape(theta.shape)

    def solve(self, cross_moment: Tensor) -> Tensor:
        # Refused and not clamped: a weight without information would get an arbitrary value.
        if not bool((self.values > 0).all()):
            raise SingularSumError
        return cross_moment / self.values.reshape(cross_moment.shape)

    def __add__(self, other: "Diagonal | Scalar") -> "Diagonal":
        return Diagonal(self.values + _diagonal_of(other))

    def scaled(self, factor: float) -> "Diagonal":
        return Diagonal(self.values * factor)

    def isotropic(self, strength: float) -> Scalar:
        return Scalar(strength * float(self.values.double().mean()))


@dataclass(frozen=True, eq=False)
class Gram:
    """A Gram matrix `G = sum_x x x^T` of a layer's inputs x, with a one behind them where the layer has a bias.

    The block is the matrix `[out, in]`, or `[out, in + 1]` with the bias as the last column. A grouped convolution has
    one matrix for each group, which applies to that group's outputs.
    """

    matrix: Float[Tensor, "*groups inputs inputs"]

    def weigh(self, theta: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        return (self._grouped(theta).to(self.matrix.dtype) @ self.matrix).reshape(theta.shape)

    def solve(self, cross_moment: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        # Cholesky and never an inverse; float64 because a Gram's condition is the square of its data's.
        factor, failed = torch.linalg.cholesky_ex(self.matrix.double())
        if failed.any():
            raise SingularSumError
        grouped = self._grouped(cross_moment).double()
        return torch.cholesky_solve(grouped.mT, factor).mT.reshape(cross_moment.shape)

    def __add__(self, other: "Gram | Sketched | Scalar") -> "Gram":
        if isinstance(other, Scalar):
            identity = torch.eye(self.matrix.shape[-1]).to(self.matrix)
            return Gram(self.matrix + other.weight * identity)
        return Gram(self.matrix + other.matrix)

    def scaled(self, factor: float) -> "Gram":
        return Gram(self.matrix * factor)

    def isotropic(self, strength: float) -> Scalar:
        return Scalar(strength * float(self.matrix.diagonal(dim1=-2, dim2=-1).double().mean()))

    def _grouped(self, theta: Tensor) -> Tensor:
        return theta.unflatten(0, (*self.matrix.shape[:-2], -1)) if self.matrix.dim() > 2 else theta


@dataclass(frozen=True, eq=False)
class Sketched:
    """A Gram matrix `S^T S + diag(d)` that is stored as its rows S and not as a square.

    (D + S^T S)^-1 = D^-1 - D^-1 S^T (I + S D^-1 S^T)^-1 S D^-1

    Sums concatenate rows; a sum with more rows than half the inputs becomes a `Gram`.

    Attributes:
        rows: the matrix S.
        spread: the diagonal d, not negative.
    """

    rows: Float[Tensor, "rows inputs"]
    spread: Float[Tensor, " inputs"]

    @property
    def matrix(self) -> Float[Tensor, "inputs inputs"]:
        """The matrix `S^T S + diag(d)`."""
        return self.rows.mT @ self.rows + self.spread.diag()

    def weigh(self, theta: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        theta = theta.to(self.rows.dtype)
        return theta @ self.rows.mT @ self.rows + theta * self.spread

    def solve(self, cross_moment: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        if not bool((self.spread > 0).all()):
            raise SingularSumError
        alone, scaled = cross_moment.double() / self.spread, self.rows / self.spread
        # Only a matrix as wide as the number of rows is factorised.
        inner = scaled @ self.rows.mT + torch.eye(len(self.rows)).to(scaled)
        factor = torch.linalg.cholesky(inner)
        return alone - torch.cholesky_solve(self.rows @ alone.mT, factor).mT @ scaled

    def __add__(self, other: "Sketched | Gram | Scalar") -> "Sketched | Gram":
        if isinstance(other, Scalar):
            return Sketched(self.rows, self.spread + other.weight)
        if isinstance(other, Gram):
            return other + self
        # Beyond half as many rows as inputs the square is used, because it does not grow with further clients.
        total = Sketched(torch.cat([self.rows, other.rows]), self.spread + other.spread)
        return Gram(total.matrix) if 2 * len(total.rows) > len(total.spread) else total

    def scaled(self, factor: float) -> "Sketched":
        return Sketched(self.rows * factor**0.5, self.spread * factor)

    def isotropic(self, strength: float) -> Scalar:
        return Scalar(strength * float((self.rows.square().sum(0) + self.spread).mean()))


def common(precisions: Mapping[Key, Precision | None]) -> list[tuple[Key, ...]]:
    """Return the keys in groups that share one Gram matrix object, or that have none; groups keep the keys' order."""
    groups: dict[object, list[Key]] = {}
    for key, precision in precisions.items():
        # By identity and not by value: layers with different inputs can have equal matrices in one client.
        shared = precision is None or isinstance(precision, Gram | Sketched)
        groups.setdefault((id(precision),) if shared else key, []).append(key)
    return [tuple(group) for group in groups.values()]


def sum_precisions(
    total_of: Callable[[Key], Precision | None], update: Mapping[Key, Precision]
) -> Iterator[tuple[tuple[Key, ...], Precision]]:
    """Yield the new totals, each with the keys that share both its old total and its summand.

    A total is computed when it is asked for, so that at most one exists beside the old ones.

    Args:
        total_of: returns the total of a key; None for a key without one, whose summand is then copied.
        update: precisions to add.
    """
    for sharing in common(update):
        for keys in common({key: total_of(key) for key in sharing}):
            total, summand = total_of(keys[0]), update[keys[0]]
            yield keys, summand.scaled(1.0) if total is None else total + summand


def _diagonal_of(precision: Diagonal | Scalar) -> Tensor | float:
    return precision.weight if isinstance(precision, Scalar) else precision.values
