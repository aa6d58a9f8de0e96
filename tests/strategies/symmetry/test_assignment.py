import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fedbasin.strategies.symmetry.groups import assignment
from fedbasin.strategies.symmetry.groups.assignment import assign, assign_all

WIDE = 1100  # searched among candidates


def units(n, features, seed):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed))


def of_unrelated(n, seed):
    return units(n, 2 * n, seed) @ units(n, 2 * n, seed + 1).T


def of_uneven_lengths(n, seed):
    lengths = (units(n, 2, seed + 2) / 2).exp()
    return lengths[:, :1] * of_unrelated(n, seed) * lengths[:, 1]


def with_a_common_direction(n, seed):
    return of_unrelated(n, seed) + 2 * n


def with_dead_units(n, seed):
    score = of_unrelated(n, seed)
    score[: n // 2] = 0
    return score


def of_few_directions(n, seed):
    return units(n, 8, seed) @ units(n, 8, seed + 1).T


def of_zeros(n, seed):
    return torch.zeros(n, n)


SCORES = [of_unrelated, of_uneven_lengths, with_a_common_direction, with_dead_units, of_few_directions, of_zeros]


def value(score, order):
    return float(score.double()[torch.arange(len(score)), order].sum())


@pytest.mark.parametrize("make", SCORES)
def test_a_wide_score_is_assigned_as_well_as_by_the_dense_solver(make):
    score = make(WIDE, 0)
    order = assign(score)
    best = linear_sum_assignment(score.double().numpy(), maximize=True)[1]
    assert torch.equal(order.sort().values, torch.arange(WIDE))
    assert value(score, order) == pytest.approx(value(score, torch.from_numpy(best)), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(33, 48), st.sampled_from([torch.float32, torch.float64]))
def test_candidates_and_prices_lead_to_the_best_order_of_any_score(seed, n, dtype):
    generator = np.random.default_rng(seed)
    # Few different values, so that ties abound.
    score = torch.from_numpy(generator.integers(-3, 4, (n, n))).to(dtype)
    edges = assignment._diagonal(score, 0.0).add(*assignment._candidates(score))
    prices = np.zeros(n)
    while True:
        order = edges.best_order(prices)
        prices = edges.raise_prices(prices, order)
        more = edges.add(*assignment._violations(score, order, prices, edges.rounding, 0.0))
        if more.count == edges.count:
            break
        edges = more
    assert value(score, torch.from_numpy(order)) == value(score, assign(score))


@pytest.mark.parametrize("n", [6, WIDE])
def test_ties_go_to_the_identity_where_the_diagonal_has_a_bonus(n):
    same = units(1, 50, 3).expand(n // 2, 50)
    score = torch.cat([same, units(n - n // 2, 50, 4)])
    score = score @ score.T
    bonus = 1e-6 * float(score.norm()) / n**0.5
    assert torch.equal(assign(score, bonus), torch.arange(n))


@pytest.mark.parametrize("n", [6, WIDE])
def test_a_planted_order_is_found(n):
    rows = units(n, 64, 5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(6))
    assert torch.equal(assign(rows @ rows[order].T), torch.argsort(order))


def test_each_matrix_of_a_batch_has_its_own_order():
    scores = units(6, 16, 7).reshape(2, 3, 4, 4)
    orders = assign_all(scores)
    assert orders.shape == (2, 3, 4)
    assert torch.equal(orders[1, 2], assign(scores[1, 2]))


def test_the_score_is_left_as_it_was():
    score = of_unrelated(WIDE, 8)
    copy = score.clone()
    assign(score, 1.0)
    assert torch.equal(score, copy)
