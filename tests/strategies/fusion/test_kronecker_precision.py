"""What Kronecker factors add to the laws of every precision, and where the usual sum of factors goes wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.precisions import Gram, Scalar, SingularSumError

W = torch.float64
OUT, IN = 3, 5
quickly = settings(max_examples=20, deadline=None)
draws = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def normal(draw, *shape):
    return torch.randn(*shape, dtype=W, generator=draw)


def second_moments(draw, size):
    rows = normal(draw, 4 * size, size)
    return (rows.T @ rows)[None]


def client(draw):
    return Kronecker(second_moments(draw, IN), second_moments(draw, OUT))


def orthogonal(draw, size):
    return torch.linalg.qr(normal(draw, size, size)).Q


def permutation(draw, size):
    return torch.eye(size, dtype=W)[torch.randperm(size, generator=draw)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("element", [orthogonal, permutation])
@quickly
@given(draw=draws)
def test_the_sum_of_moved_clients_is_the_moved_sum(element, draw):
    left, right = element(draw, OUT), element(draw, IN)
    clients = [(client(draw), normal(draw, OUT, IN)) for _ in range(3)]
    moved = [
        (Kronecker(right @ c.inputs @ right.T, left @ c.outputs @ left.T), left @ theta @ right.T)
        for c, theta in clients
    ]
    close(fused(moved), left @ fused(clients) @ right.T)


def fused(clients):
    (total, theta), *others = clients
    moment = total.weigh(theta)
    for precision, theta in others:
        total, moment = total + precision, moment + precision.weigh(theta)
    return total.solve(moment)


@quickly
@given(draw=draws)
def test_the_map_is_the_kronecker_product_written_out(draw):
    both, theta = client(draw) + client(draw) + Scalar(0.3), normal(draw, OUT, IN)
    written = sum(torch.kron(b, a) for a, b in zip(both.inputs, both.outputs, strict=True)) + 0.3 * torch.eye(
        OUT * IN, dtype=W
    )
    close(both.weigh(theta).flatten(), written @ theta.flatten())
    close(both.solve(theta).flatten(), torch.linalg.solve(written, theta.flatten()))


@quickly
@given(draw=draws)
def test_outputs_that_are_all_alike_give_regmean(draw):
    alike = [(Kronecker(second_moments(draw, IN), torch.eye(OUT, dtype=W)[None])) for _ in "abc"]
    thetas = [normal(draw, OUT, IN) for _ in "abc"]
    grams = [Gram(precision.inputs[0]) for precision in alike]
    close(fused(list(zip(alike, thetas, strict=True))), fused(list(zip(grams, thetas, strict=True))))


@quickly
@given(draw=draws)
def test_equal_weights_stay_which_sums_of_factors_do_not_give(draw):
    theta, clients = normal(draw, OUT, IN), [client(draw) for _ in range(3)]
    close(fused([(precision, theta) for precision in clients]), theta)
    moment = torch.stack([precision.weigh(theta) for precision in clients]).sum(0)
    factors = Kronecker(
        torch.stack([c.inputs for c in clients]).sum(0), torch.stack([c.outputs for c in clients]).sum(0)
    )
    assert float((factors.solve(moment) - theta).norm()) > 0.1 * float(theta.norm())


def test_clients_that_know_different_things_are_solved_together():
    """Neither knows anything of the other's half of the inputs, and each is sure of one output alone."""
    halves = (torch.diag(torch.tensor([1.0, 1, 0, 0], dtype=W)), torch.diag(torch.tensor([0.0, 0, 1, 1], dtype=W)))
    sure = torch.diag(torch.tensor([1.0, 1e-1], dtype=W)), torch.diag(torch.tensor([1e-1, 1.0]))
    thetas = torch.full((2, 4), 1.0, dtype=W), torch.full((2, 4), 5.0, dtype=W)
    found = fused([(Kronecker(a[None], b[None].to(W)), t) for a, b, t in zip(halves, sure, thetas, strict=True)])
    close(found, torch.tensor([[1.0, 1, 5, 5], [1, 1, 5, 5]], dtype=W))


def test_a_sum_that_is_singular_although_its_traces_are_not_is_refused_or_solved():
    """One client knows the first input through the first output alone, the other the second through the second."""
    first, second = (torch.diag(torch.tensor([1.0, 0], dtype=W)), torch.diag(torch.tensor([0, 1.0], dtype=W)))
    both = Kronecker(first[None], first[None]) + Kronecker(second[None], second[None].to(W))
    with pytest.raises(SingularSumError, match="ridge"):
        both.solve(torch.ones(2, 2, dtype=W))
    close((both + Scalar(0.5)).solve(torch.ones(2, 2, dtype=W)), torch.tensor([[1 / 1.5, 2], [2, 1 / 1.5]], dtype=W))
