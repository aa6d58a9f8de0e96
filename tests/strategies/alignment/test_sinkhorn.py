import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedbasin.strategies.alignment.graph_matching import match_graph
from fedbasin.strategies.alignment.sinkhorn import match_sinkhorn, sinkhorn
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.groups.assignment import assign


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_rows_sum_to_one_and_columns_to_their_share(n, m, seed):
    plan = sinkhorn(drawn(n, m, seed=seed), 1.0, iterations=200)
    torch.testing.assert_close(plan.sum(1), torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((m,), n / m, dtype=torch.float64))


def test_at_a_low_temperature_the_plan_is_the_best_order():
    score = drawn(12, 12)
    plan = sinkhorn(score, 0.01, iterations=500)
    assert torch.equal(plan.argmax(1), assign(score))


def test_the_plan_can_be_differentiated():
    score = drawn(4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sinkhorn(s, 0.7), score)


@pytest.mark.parametrize("match", [match_sinkhorn, match_graph])
@pytest.mark.parametrize("seed", range(3))
def test_deciding_softly_ends_no_further_from_the_anchor_than_space_after_space(match, seed):
    def state(number):
        torch.manual_seed(number)
        layers = nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
        return nn.Sequential(*layers)

    anchor, client = state(seed), state(100 + seed)
    symmetry = discover(anchor, torch.zeros(1, 6)).symmetry
    states = dict(anchor.state_dict()), dict(client.state_dict())
    soft, hard = match(symmetry, *states), match_weights(symmetry, *states)
    assert soft.report.distance_after <= hard.report.distance_after
    inputs = torch.randn(5, 6)
    client.load_state_dict(soft.state)
    moved = client(inputs)
    client.load_state_dict(states[1])
    torch.testing.assert_close(moved, client(inputs))
