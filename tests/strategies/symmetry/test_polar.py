"""Polar factors of batches of matrices, whichever way they are found."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedbasin.strategies.symmetry.groups import polar as module
from fedbasin.strategies.symmetry.groups.polar import polar


def _drawn(seed: int, least: float, size: int = 6, count: int = 3) -> tuple[Tensor, Tensor]:
    """Matrices with singular values from 1 down to `least`, and their polar factors."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, count, size, size, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(noise).Q
    values = torch.logspace(0, torch.tensor(least).log10().item(), size, dtype=torch.float64)
    return left * values @ right.mT, left @ right.mT


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.floats(1e-3, 1.0), st.floats(1e-12, 1e12))
def test_a_polar_factor_is_orthogonal_and_the_one_of_the_matrix_at_any_scale(
    seed: int, least: float, scale: float
) -> None:
    matrices, factors = _drawn(seed, least)
    found = polar(matrices * scale)
    eye = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    torch.testing.assert_close(found @ found.mT, eye, atol=1e-13, rtol=0)
    torch.testing.assert_close(found, factors, atol=1e-9, rtol=0)
    agreed, most = (((each * matrices).sum()) for each in (found, factors))
    assert abs(agreed - most) <= 1e-10 * most


def test_heads_near_the_anchor_are_never_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    anchor, noise = torch.randn(2, 3, 64, 1536, generator=generator, dtype=torch.float64)
    matrices = anchor @ (anchor + 0.1 * noise).mT
    left, _, right = torch.linalg.svd(matrices)
    monkeypatch.setattr(module.torch.linalg, "svd", None)
    torch.testing.assert_close(polar(matrices), left @ right, atol=1e-12, rtol=0)


def test_a_singular_matrix_does_not_spoil_the_others_of_its_batch() -> None:
    matrices, factors = _drawn(1, 0.5)
    matrices[1] = 0
    found = polar(matrices)
    torch.testing.assert_close(found[::2], factors[::2], atol=1e-9, rtol=0)
    torch.testing.assert_close(found[1] @ found[1].mT, torch.eye(6, dtype=torch.float64))


def test_a_reflection_stays_one() -> None:
    matrices = torch.diag(torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(polar(matrices), matrices.sign())
