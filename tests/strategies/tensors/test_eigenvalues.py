"""Eigendecompositions of second moments that repeat, and of all others as LAPACK gives them."""

import pytest
import torch
from torch.nn.functional import one_hot, pad

from fedbasin.strategies.tensors.eigenvalues import eigendecompose


def moments(columns, kinds, rows, seed, used=1.0):
    """Return the Gram matrix of one-hot codes, a column of ones last; of each code only a part is ever used."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, max(1, int(kinds * used)), (rows, columns), generator=draw)
    inputs = pad(one_hot(codes, kinds).flatten(1).double(), (0, 1), value=1.0)
    return inputs.T @ inputs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("columns", "kinds", "used"), [(204, 5, 0.2), (32, 32, 0.1), (512, 2, 0.5), (64, 16, 1.0), (1, 300, 0.3)]
)
def test_second_moments_of_codes_are_decomposed(columns, kinds, used, seed):
    gram = moments(columns, kinds, 1257, seed, used)
    values, vectors = eigendecompose(gram)
    torch.testing.assert_close(vectors * values @ vectors.T, gram, atol=1e-6 * 1257, rtol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(gram), dtype=gram.dtype))


def test_a_decomposition_that_does_not_converge_is_repeated_with_eigenvalues_apart(monkeypatch):
    first, calls = torch.linalg.eigh, []

    def fails_once(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return first(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_once)
    gram = moments(8, 4, 50, 0, 0.5)
    values, vectors = eigendecompose(gram)
    assert len(calls) == 2
    torch.testing.assert_close(vectors * values @ vectors.T, gram, atol=1e-6, rtol=0)


def test_other_matrices_are_decomposed_to_the_bit():
    draw = torch.randn(40, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert all(map(torch.equal, eigendecompose(draw.T @ draw), torch.linalg.eigh(draw.T @ draw)))
