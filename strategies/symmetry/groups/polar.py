"""The polar factor of a matrix: the orthogonal matrix with the largest inner product with it.

    M = U P        U orthogonal, P positive semi-definite        U = argmax_T <T, M>

The Newton-Schulz iteration needs only products of matrices, which processors do fastest,

    X_0 = M / s        X_(k+1) = X_k (3 I - X_k^T X_k) / 2

It keeps the singular vectors and takes every singular value in (0, sqrt 3) to 1, so an orthogonal limit is U (Higham
2008, Functions of Matrices, section 8.3). Singular values far below the largest take many steps; a matrix that has
such values is decomposed by an SVD instead.
"""

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.tensors.parallel import one_core

# Ten steps cost a third of an SVD and suffice where the smallest singular value is a tenth of the largest.
_STEPS = 10

# From this ||X^T X - I|| one more step reaches rounding, because a step squares the error.
_NEAR = 1e-8

# The bound on the largest singular value usually exceeds it by this factor. Scaling up by it starts the iteration
# nearer to 1 and still below sqrt 3.
_LOOSE = 2**0.5

# Matrices up to this size are finished before several threads have synchronised.
_SMALL = 256


def polar(matrices: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Return the polar factor of each matrix; a singular matrix has several, and one of them is returned."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    # Many small products: threads would wait for each other longer than they compute.
    with one_core() if flat.shape[-1] <= _SMALL else nullcontext():
        factors, converged = _iterate(flat)
        if not converged.all():
            left, _, right = torch.linalg.svd(flat[~converged])
            factors[~converged] = left @ right
    return factors.reshape(matrices.shape)


def _iterate(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last iterates, and a mask of the matrices for which these are the polar factors."""
    # A matrix of zeros becomes NaN here and therefore never converges.
    factors = matrices * (_LOOSE / _bound(matrices))[:, None, None]
    for _ in range(_STEPS):
        excess = factors.mT @ factors
        excess.diagonal(dim1=-2, dim2=-1).sub_(1)
        converged = torch.linalg.matrix_norm(excess) < _NEAR
        factors = torch.baddbmm(factors, factors, excess, alpha=-0.5)
        if converged.all():
            break
    return factors, converged


def _bound(matrices: Tensor) -> Float[Tensor, " batch"]:
    """Return an upper bound on the largest singular value of each matrix, `sqrt(||M||_1 ||M||_inf)`."""
    sizes = matrices.abs()
    return (sizes.sum(-1).amax(-1) * sizes.sum(-2).amax(-1)).sqrt()
