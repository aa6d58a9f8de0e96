"""The eigendecomposition of a symmetric matrix, also where LAPACK's own does not converge.

Divide and conquer (`syevd`) can fail on matrices of many equal eigenvalues, such as second moments of inputs most of
which are always zero, or are one-hot: seen on a Gram matrix of 1025 whole numbers, 923 of them zero on the diagonal.
"""

import torch
from jaxtyping import Float
from torch import Tensor

# Relative to the mean diagonal: far above the rounding of doubles, and far below every regulariser.
_APART = 1e-10


def eigendecompose(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Return the eigenvalues of a symmetric matrix, smallest first, and its eigenvectors in columns.

    Where the decomposition does not converge, the diagonal is moved by up to 1e-10 of its mean, a different step for
    each row, so that no two eigenvalues are equal.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # torch's stubs lack it
        steps = torch.linspace(0, _APART, len(matrix)).to(matrix) * matrix.diagonal().abs().mean()
        values, vectors = torch.linalg.eigh(matrix + steps.diag())
    return values, vectors
