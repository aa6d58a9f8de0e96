"""One suite of laws for every precision: what a client knows about its weights, in float64."""

from itertools import accumulate
from operator import add

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.fusion.kronecker_precision import Kronecker
from fedbasin.strategies.fusion.precisions import Diagonal, Gram, Scalar, SingularSumError, Sketched
from fedbasin.strategies.fusion.update import join

W = torch.float64


def normal(draw, *shape):
    return torch.randn(*shape, dtype=W, generator=draw)


def scalar(draw):
    return Scalar(float(torch.rand((), dtype=W, generator=draw)) * 99 + 1)


def diagonal(draw):
    return Diagonal(torch.rand(3, 5, dtype=W, generator=draw) + 0.1)


def gram_of(rows):
    return Gram(rows.T @ rows)


def gram(draw):
    return gram_of(normal(draw, 20, 5))


def gram_with_bias(draw):
    return gram_of(torch.cat([normal(draw, 20, 4), torch.ones(20, 1, dtype=W)], dim=1))


def gram_of_convolution(draw):
    return gram_of(normal(draw, 30, 2 * 3 * 2))


def gram_of_groups(draw):
    rows = normal(draw, 3, 30, 5)
    return Gram(rows.mT @ rows)


def sketched(draw):
    return Sketched(normal(draw, 2, 5), torch.rand(5, dtype=W, generator=draw) + 0.1)


def kronecker(draw):
    inputs, outputs = normal(draw, 20, 5), normal(draw, 12, 3)
    return Kronecker((inputs.T @ inputs)[None], (outputs.T @ outputs)[None])


def kroneckers_of_three_clients(draw):
    return kronecker(draw) + kronecker(draw) + kronecker(draw)


def matrix(draw):
    return normal(draw, 3, 5)


def with_bias(draw):
    return join(("w", "b"), {"w": normal(draw, 3, 4), "b": normal(draw, 3)})


def convolution(draw):
    return join(("w",), {"w": normal(draw, 3, 2, 3, 2)})


def grouped(draw):
    return join(("w", "b"), {"w": normal(draw, 6, 4), "b": normal(draw, 6)})


KINDS = {
    "scalar": (scalar, matrix),
    "diagonal": (diagonal, matrix),
    "gram": (gram, matrix),
    "gram with bias": (gram_with_bias, with_bias),
    "gram of a convolution": (gram_of_convolution, convolution),
    "grams of groups": (gram_of_groups, grouped),
    "sketched": (sketched, matrix),
    "kronecker": (kronecker, matrix),
    "kronecker with bias": (kronecker, with_bias),
    "kroneckers of three clients": (kroneckers_of_three_clients, matrix),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
quickly = settings(max_examples=20, deadline=None)
draws = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@every_kind
@quickly
@given(draw=draws)
def test_solving_undoes_weighing(kind, draw):
    precision, theta = (make(draw) for make in KINDS[kind])
    close(precision.solve(precision.weigh(theta)), theta)


@every_kind
@quickly
@given(draw=draws)
def test_addition_is_that_of_the_maps(kind, draw):
    make, make_theta = KINDS[kind]
    a, b, c, theta = make(draw), make(draw), make(draw), make_theta(draw)
    close((a + b).weigh(theta), a.weigh(theta) + b.weigh(theta))
    close((a + b).weigh(theta), (b + a).weigh(theta))
    close(((a + b) + c).weigh(theta), (a + (b + c)).weigh(theta))


@every_kind
@quickly
@given(draw=draws)
def test_sums_and_multiples_stay_positive(kind, draw):
    make, make_theta = KINDS[kind]
    a, b, theta = make(draw), make(draw), make_theta(draw)
    for precision in (a, a + b, a.scaled(0.5), a + a.isotropic(1e-3)):
        assert float((theta * precision.weigh(theta)).sum()) > 0


@every_kind
@quickly
@given(draw=draws, factor=st.floats(1e-3, 1e3))
def test_scaling_is_that_of_the_map(kind, draw, factor):
    precision, theta = (make(draw) for make in KINDS[kind])
    close(precision.scaled(factor).weigh(theta), precision.weigh(theta) * factor)


@every_kind
@quickly
@given(draw=draws)
def test_a_ridge_adds_its_strength_times_the_mean_diagonal_to_every_weight(kind, draw):
    precision, theta = (make(draw) for make in KINDS[kind])
    prior = precision.isotropic(0.25)
    basis = torch.eye(theta.numel(), dtype=W).reshape(-1, *theta.shape)
    diagonal = torch.stack([(unit * precision.weigh(unit)).sum() for unit in basis])
    assert prior.weight == pytest.approx(0.25 * float(diagonal.mean()))
    close((precision + prior).weigh(theta), precision.weigh(theta) + prior.weight * theta)


def test_sketches_add_up_to_the_square_once_that_is_smaller():
    draw = torch.Generator().manual_seed(0)
    sketches = [Sketched(normal(draw, 2, 9), torch.ones(9, dtype=W)) for _ in range(5)]
    sums = list(accumulate(sketches, add))
    assert [type(total) for total in sums] == [Sketched, Sketched, Gram, Gram, Gram]
    close(sums[-1].matrix, sum(sketch.matrix for sketch in sketches))
    close((sketches[0] + sums[-1]).matrix, (sums[-1] + sketches[0]).matrix)


@pytest.mark.parametrize(
    "precision",
    [
        Diagonal(torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=W)),
        Gram(torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=W)),
        Sketched(torch.ones(1, 2, dtype=W), torch.zeros(2, dtype=W)),
        Kronecker(torch.ones(1, 2, 2, dtype=W), torch.eye(2, dtype=W)[None]),
        Kronecker(torch.eye(2, dtype=W)[None], torch.ones(1, 2, 2, dtype=W)),
        Kronecker(torch.zeros(1, 2, 2, dtype=W), torch.zeros(1, 2, 2, dtype=W)),
    ],
)
def test_a_direction_that_nobody_knows_is_refused_with_the_remedy(precision):
    with pytest.raises(SingularSumError, match="ridge"):
        precision.solve(torch.ones(2, 2, dtype=W))
