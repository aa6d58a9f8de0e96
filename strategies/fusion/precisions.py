"""What a client knows about its own weights: the precision Lambda of one sum.

    theta* = (sum_k Lambda_k)^-1  sum_k Lambda_k . theta_k

    Scalar(n)      n examples                              FedAvg   (McMahan et al. 2017, arXiv 1602.05629)
    Diagonal(F)    diagonal Fisher information             Fisher   (Matena and Raffel 2022, arXiv 2111.09832)
    Gram(X^T X)    second moments of a layer's inputs      RegMean  (Jin et al. 2023, arXiv 2212.09849)
    Sketched(S, d) the same, as S^T S + diag(d)            solved after Woodbury 1950

Laws: `p.solve(p.weigh(theta)) = theta` for a positive definite p; addition is commutative and associative.

Layers that read the same inputs have one Gram matrix in common: the same object, which is summed and factorised once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Key = TypeVar("Key")


class SingularSumError(ValueError):
    """The clients together know nothing of some direction, so the sum has no single solution."""

    def __init__(self) -> None:
        super().__init__(
            "the summed precision is singular; fuse with a ridge (regulariser) above zero"
        )


class Precision(Protocol):
    """A symmetric positive semi-definite map on one block of weights."""

    def weigh(self, theta: Tensor) -> Tensor:
        """`Lambda . theta`: the moment that a client adds."""
        ...

    def solve(self, moment: Tensor) -> Tensor:
        """`Lambda^-1 . moment`: the weights that a sum stands for."""
        ...

    def __add__(self, other: Self) -> "Precision":
        """The precision of both together."""
        ...

    def scaled(self, factor: float) -> Self:
        """`factor . Lambda`."""
        ...

    def isotropic(self, strength: float) -> "Scalar":
        """`strength` times the mean of the diagonal, on every weight: a ridge that knows the scale."""
        ...


@dataclass(frozen=True)
class Scalar:
    """Every weight is known equally well, in proportion to the number of examples."""

    weight: float

    def weigh(self, theta: Tensor) -> Tensor:
        return theta * self.weight

    def solve(self, moment: Tensor) -> Tensor:
        return moment / self.weight

    def __add__(self, other: Self) -> "Scalar":
        return Scalar(self.weight + other.weight)

    def scaled(self, factor: float) -> "Scalar":
        return Scalar(self.weight * factor)

    def isotropic(self, strength: float) -> "Scalar":
        return Scalar(self.weight * strength)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Every weight is known to its own degree; as many values as the block has weights."""

    values: Float[Tensor, "..."]

    def weigh(self, theta: Tensor) -> Tensor:
        return theta * self.values.reshape(theta.shape)

    def solve(self, moment: Tensor) -> Tensor:
        if not bool((self.values > 0).all()):
            raise SingularSumError
        return moment / self.values.reshape(moment.shape)

    def __add__(self, other: "Diagonal | Scalar") -> "Diagonal":
        return Diagonal(self.values + _diagonal_of(other))

    def scaled(self, factor: float) -> "Diagonal":
        return Diagonal(self.values * factor)

    def isotropic(self, strength: float) -> Scalar:
        return Scalar(strength * float(self.values.double().mean()))


@dataclass(frozen=True, eq=False)
class Gram:
    """A layer is known along the inputs that it has seen: `G = sum_x x x^T`, x with a one for the bias.

    The block is the matrix `[out, in]`, or `[out, in + 1]` with the bias as the last column. Where a convolution's
    groups read channels of their own, each has its own matrix and its own part of the outputs.
    """

    matrix: Float[Tensor, "*groups inputs inputs"]

    def weigh(self, theta: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        return (self._grouped(theta).to(self.matrix.dtype) @ self.matrix).reshape(theta.shape)

    def solve(self, moment: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        # Cholesky and never an inverse; float64 because a Gram's condition is the square of its data's.
        factor, failed = torch.linalg.cholesky_ex(self.matrix.double())
        if failed.any():
            raise SingularSumError
        grouped = self._grouped(moment).double()
        return torch.cholesky_solve(grouped.mT, factor).mT.reshape(moment.shape)

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
    """A Gram matrix `S^T S + diag(d)` without the square, until the square is smaller than its rows would be.

    (D + S^T S)^-1 = D^-1 - D^-1 S^T (I + S D^-1 S^T)^-1 S D^-1

    Attributes:
        rows: S.
        spread: d, none of it negative.
    """

    rows: Float[Tensor, "kept inputs"]
    spread: Float[Tensor, " inputs"]

    @property
    def matrix(self) -> Float[Tensor, "inputs inputs"]:
        """The square."""
        return self.rows.mT @ self.rows + self.spread.diag()

    def weigh(self, theta: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        theta = theta.to(self.rows.dtype)
        return theta @ self.rows.mT @ self.rows + theta * self.spread

    def solve(self, moment: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        if not bool((self.spread > 0).all()):
            raise SingularSumError
        alone, scaled = moment.double() / self.spread, self.rows / self.spread
        inner = scaled @ self.rows.mT + torch.eye(len(self.rows)).to(scaled)
        factor = torch.linalg.cholesky(inner)
        return alone - torch.cholesky_solve(self.rows @ alone.mT, factor).mT @ scaled

    def __add__(self, other: "Sketched | Gram | Scalar") -> "Sketched | Gram":
        if isinstance(other, Scalar):
            return Sketched(self.rows, self.spread + other.weight)
        if isinstance(other, Gram):
            return other + self
        total = Sketched(torch.cat([self.rows, other.rows]), self.spread + other.spread)
        return Gram(total.matrix) if 2 * len(total.rows) > len(total.spread) else total

    def scaled(self, factor: float) -> "Sketched":
        return Sketched(self.rows * factor**0.5, self.spread * factor)

    def isotropic(self, strength: float) -> Scalar:
        return Scalar(strength * float((self.rows.square().sum(0) + self.spread).mean()))


def common(known: Mapping[Key, Precision | None]) -> list[tuple[Key, ...]]:
    """The keys in groups, those together that have one Gram matrix in common; a group keeps their order."""
    groups: dict[object, list[Key]] = {}
    for key, precision in known.items():
        # Not an equal one: layers whose inputs differ may well have equal matrices for once.
        shared = precision is None or isinstance(precision, Gram | Sketched)
        groups.setdefault((id(precision),) if shared else key, []).append(key)
    return [tuple(group) for group in groups.values()]


def added(
    known: Callable[[Key], Precision | None], more: Mapping[Key, Precision]
) -> Iterator[tuple[tuple[Key, ...], Precision]]:
    """Sums of what is known already and what comes with it, each made once for the keys that have both in common.

    Sums are made one by one, as they are taken, so that no more than one is held beside those before.

    Args:
        known: what is known before; None where that is nothing. What comes is then copied.
        more: what comes.
    """
    for alike in common(more):
        for keys in common({key: known(key) for key in alike}):
            before, coming = known(keys[0]), more[keys[0]]
            yield keys, coming.scaled(1.0) if before is None else before + coming


def _diagonal_of(precision: Diagonal | Scalar) -> Tensor | float:
    return precision.weight if isinstance(precision, Scalar) else precision.values
