"""Kronecker-factored curvature: a layer is known along its inputs and along its outputs.

    Lambda = sum_k A_k kron B_k        Lambda . W = sum_k B_k W A_k
    A_k   second moments of client k's inputs, a one for the bias included
    B_k   second moments of the gradients at its outputs

A sum of Kronecker products is no Kronecker product. The usual way out is to sum both factors on their own
(`sum A_k kron sum B_k`); then clients that all have the same weights no longer give those weights, because what
divides is not what has multiplied. So the products are kept, and the sum is solved by conjugate gradients. Their
preconditioner is the one product with the sum's partial traces, which is exact where there is one client.

Source: Martens and Grosse 2015 (K-FAC), arXiv 1503.05671; for convolutions Grosse and Martens 2016,
arXiv 1602.01407; in one-shot federated learning Jhunjhunwala et al. 2024 (FedFisher), arXiv 2403.12329.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.fusion.precisions import Scalar, SingularSumError

# Products that a sum keeps; one client adds one. Memory grows with the clients up to here and no further.
MOST_PRODUCTS = 32

# Of the residual, relative to the moment: where the solver is done, and what it may end with.
_DONE = 1e-11
_ENOUGH = 1e-4
_STEPS = 1000


@dataclass(frozen=True, eq=False)
class Kronecker:
    """A sum of Kronecker products, and a ridge on every weight.

    The block is the matrix `[out, in]`, or `[out, in + 1]` with the bias as the last column.

    Attributes:
        inputs: the A of each product.
        outputs: the B of each product.
        ridge: on every weight alike.
    """

    inputs: Float[Tensor, "products inputs inputs"]
    outputs: Float[Tensor, "products out out"]
    ridge: float = 0.0

    def weigh(self, theta: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        values = theta.to(self.inputs.dtype)
        total = values * self.ridge
        for a, b in zip(self.inputs, self.outputs, strict=True):
            total = total + b @ values @ a
        return total

    def solve(self, moment: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        exact = replace(self, inputs=self.inputs.double(), outputs=self.outputs.double())
        return _conjugate_gradients(exact.weigh, exact.nearest(), moment.double())

    def nearest(self) -> Callable[[Tensor], Tensor]:
        """Division by the one Kronecker product with the same partial traces, and the ridge.

        Raises:
            SingularSumError: some direction of the inputs or of the outputs is in none of the products.
        """
        traces = [_trace(self.outputs), _trace(self.inputs)]
        total = float((traces[0] * traces[1]).sum())
        sums = [
            (trace[:, None, None] * factors).sum(0)
            for trace, factors in zip(traces, (self.inputs, self.outputs), strict=True)
        ]
        (alpha, v), (beta, u) = (torch.linalg.eigh(each) for each in sums)
        curvature = beta[:, None] * alpha / (total or 1.0) + self.ridge
        if not float(curvature.min()) > torch.finfo(curvature.dtype).eps * float(curvature.max()):
            raise SingularSumError
        return lambda residual: u @ ((u.mT @ residual @ v) / curvature) @ v.mT

    def __add__(self, other: "Kronecker | Scalar") -> "Kronecker":
        if isinstance(other, Scalar):
            return replace(self, ridge=self.ridge + other.weight)
        return Kronecker(
            torch.cat([self.inputs, other.inputs]),
            torch.cat([self.outputs, other.outputs]),
            self.ridge + other.ridge,
        )

    def scaled(self, factor: float) -> "Kronecker":
        return Kronecker(self.inputs * factor, self.outputs.clone(), self.ridge * factor)

    def isotropic(self, strength: float) -> Scalar:
        sizes = self.inputs.shape[-1] * self.outputs.shape[-1]
        mean = float((_trace(self.inputs) * _trace(self.outputs)).sum()) / sizes
        return Scalar(strength * (mean + self.ridge))


def _trace(factors: Float[Tensor, "products n n"]) -> Float[Tensor, " products"]:
    return factors.diagonal(dim1=-2, dim2=-1).sum(-1)


def _conjugate_gradients(
    weigh: Callable[[Tensor], Tensor], divide: Callable[[Tensor], Tensor], moment: Tensor
) -> Tensor:
    """The weights whose moment this is: Hestenes and Stiefel 1952, preconditioned.

    Raises:
        SingularSumError: it does not get there, as where the sum is singular up to rounding.
    """
    solution, residual = torch.zeros_like(moment), moment
    done = _DONE * float(moment.norm())
    direction = step = divide(residual)
    slope = float((residual * step).sum())
    for _ in range(_STEPS):
        if float(residual.norm()) <= done:
            return solution
        curved = weigh(direction)
        curvature = float((direction * curved).sum())
        if not curvature > 0:
            break
        length = slope / curvature
        solution = solution + length * direction
        residual = residual - length * curved
        step = divide(residual)
        before, slope = slope, float((residual * step).sum())
        direction = step + (slope / before) * direction
    if not float((moment - weigh(solution)).norm()) <= _ENOUGH * float(moment.norm()):
        raise SingularSumError
    return solution
