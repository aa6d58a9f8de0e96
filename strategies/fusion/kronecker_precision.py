"""Kronecker-factored curvature: a precision of a layer from second moments of its inputs and output gradients.

    Lambda = sum_k A_k kron B_k        Lambda . W = sum_k B_k W A_k
    A_k   second moments of client k's inputs, a one for the bias included
    B_k   second moments of the gradients at its outputs

A sum of Kronecker products is not a Kronecker product. Summing both factors separately (`sum A_k kron sum B_k`) is the
usual approximation, but then clients with equal weights do not fuse to those weights, because the matrix that divides
is not the one that multiplied. Therefore all products are stored, and the sum is solved by conjugate gradients. The
preconditioner is the single product with the sum's partial traces, which is exact for one client.

Source: Martens and Grosse 2015 (K-FAC), arXiv 1503.05671; for convolutions Grosse and Martens 2016,
arXiv 1602.01407; in one-shot federated learning Jhunjhunwala et al. 2024 (FedFisher), arXiv 2403.12329.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.fusion.precisions import Scalar, SingularSumError
from fedbasin.strategies.tensors.eigenvalues import eigendecompose

# Products in a sum, one for each client: memory grows with the clients up to this number, and more are refused.
MOST_PRODUCTS = 32

# Norms of the residual, relative to the cross-moment. Iterations stop at the first; rounding can stall them above it,
# and a solution within the second is still far more exact than float32 weights' statistics are.
_CONVERGED = 1e-11
_ACCEPTABLE = 1e-4
_MAX_ITERATIONS = 1000


@dataclass(frozen=True, eq=False)
class Kronecker:
    """A sum of Kronecker products plus a ridge on every weight.

    The block is the matrix `[out, in]`, or `[out, in + 1]` with the bias as the last column.

    Attributes:
        inputs: factor A of each product.
        outputs: factor B of each product.
        ridge: multiple of the identity that is added.
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

    def solve(self, cross_moment: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        exact = replace(self, inputs=self.inputs.double(), outputs=self.outputs.double())
        return _conjugate_gradients(exact.weigh, exact.nearest(), cross_moment.double())

    def nearest(self) -> Callable[[Tensor], Tensor]:
        """Return the inverse of the single Kronecker product with the same partial traces, ridge included.

        Raises:
            SingularSumError: no product covers some direction of the inputs or of the outputs.
        """
        traces = [_trace(self.outputs), _trace(self.inputs)]
        total = float((traces[0] * traces[1]).sum())
        sums = [
            (trace[:, None, None] * factors).sum(0)
            for trace, factors in zip(traces, (self.inputs, self.outputs), strict=True)
        ]
        (alpha, v), (beta, u) = (eigendecompose(factor) for factor in sums)
        curvature = beta[:, None] * alpha / (total or 1.0) + self.ridge
        # An eigenvalue within rounding of zero would be divided by.
        if not float(curvature.min()) > torch.finfo(curvature.dtype).eps * float(curvature.max()):
            raise SingularSumError
        return lambda residual: u @ ((u.mT @ residual @ v) / curvature) @ v.mT

    def __add__(self, other: "Kronecker | Scalar") -> "Kronecker":
        if isinstance(other, Scalar):
            return replace(self, ridge=self.ridge + other.weight)
        return Kronecker(
            torch.cat([self.inputs, other.inputs]), torch.cat([self.outputs, other.outputs]), self.ridge + other.ridge
        )

    def scaled(self, factor: float) -> "Kronecker":
        # The outputs are copied, because they may be a view of the reply, which must be freed.
        return Kronecker(self.inputs * factor, self.outputs.clone(), self.ridge * factor)

    def isotropic(self, strength: float) -> Scalar:
        sizes = self.inputs.shape[-1] * self.outputs.shape[-1]
        mean = float((_trace(self.inputs) * _trace(self.outputs)).sum()) / sizes
        return Scalar(strength * (mean + self.ridge))


def _trace(factors: Float[Tensor, "products n n"]) -> Float[Tensor, " products"]:
    return factors.diagonal(dim1=-2, dim2=-1).sum(-1)


def _conjugate_gradients(
    weigh: Callable[[Tensor], Tensor], divide: Callable[[Tensor], Tensor], cross_moment: Tensor
) -> Tensor:
    """Solve `weigh(x) = cross_moment` for x by preconditioned conjugate gradients (Hestenes and Stiefel 1952).

    Args:
        weigh: multiplication by a symmetric positive definite map.
        divide: preconditioner, an approximate inverse of `weigh`.
        cross_moment: right-hand side.

    Raises:
        SingularSumError: the iterations do not converge, as for a map that is singular up to rounding.
    """
    solution, residual = torch.zeros_like(cross_moment), cross_moment
    tolerance = _CONVERGED * float(cross_moment.norm())
    direction = step = divide(residual)
    slope = float((residual * step).sum())
    for _ in range(_MAX_ITERATIONS):
        if float(residual.norm()) <= tolerance:
            return solution
        curved = weigh(direction)
        curvature = float((direction * curved).sum())
        if not curvature > 0:
            # A direction without curvature: the check below decides if the solution is good enough.
            break
        length = slope / curvature
        solution = solution + length * direction
        residual = residual - length * curved
        step = divide(residual)
        previous_slope, slope = slope, float((residual * step).sum())
        direction = step + (slope / previous_slope) * direction
    # The updated residual drifts from the true one, so the true one decides. `not <=` also refuses NaN.
    if not float((cross_moment - weigh(solution)).norm()) <= _ACCEPTABLE * float(cross_moment.norm()):
        raise SingularSumError
    return solution
