"""The orthogonal matrix that agrees best with each matrix of a batch: its polar factor.

    M = U P        U orthogonal, P positive semi-definite        U = argmax_T <T, M>

Newton and Schulz's iteration needs only products of matrices, which processors are best at,

    X_0 = M / s        X_(k+1) = X_k (3 I - X_k^T X_k) / 2

It keeps the singular vectors and takes every singular value in (0, sqrt 3) to 1, so that what it ends in, if it is
orthogonal, is U (Higham 2008, Functions of Matrices, section 8.3). Values far below the largest take many steps:
such a matrix is decomposed.
"""

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.tensors.parallel import one_core

# As many steps cost a third of a decomposition; they do where the least singular value is a tenth of the largest.
_STEPS = 10

# ||X^T X - I|| from which one more step ends in rounding, as it is squared.
_NEAR = 1e-8

# A bound on the largest singular value is as far above it, as a rule; taken down it still begins below sqrt 3.
_LOOSE = 2**0.5

# Matrices up to this size are done before threads have met.
_SMALL = 256


def polar(matrices: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The polar factor of each matrix; of a singular one, one of those that it has."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    with one_core() if flat.shape[-1] <= _SMALL else nullcontext():
        factors, found = _iterated(flat)
        if not found.all():
            left, _, right = torch.linalg.svd(flat[~found])
            factors[~found] = left @ right
    return factors.reshape(matrices.shape)


def _iterated(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """What the iteration ends in, and for which matrices that is the polar factor."""
    # Zeros are no numbers from here on, and never found.
    factors = matrices * (_LOOSE / _bound(matrices))[:, None, None]
    for _ in range(_STEPS):
        excess = factors.mT @ factors
        excess.diagonal(dim1=-2, dim2=-1).sub_(1)
        found = torch.linalg.matrix_norm(excess) < _NEAR
        factors = torch.baddbmm(factors, factors, excess, alpha=-0.5)
        if found.all():
            break
    return factors, found


def _bound(matrices: Tensor) -> Float[Tensor, " batch"]:
    """A bound on the largest singular value of each matrix."""
    sizes = matrices.abs()
    return (sizes.sum(-1).amax(-1) * sizes.sum(-2).amax(-1)).sqrt()
