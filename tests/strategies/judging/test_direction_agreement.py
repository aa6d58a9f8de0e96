"""Updates that point against the others' count less in the whole round; those that point along may be longer."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.direction_agreement import DirectionAgreement, direction_agreement
from fedbasin.strategies.judging.influence import Measure, Verdict

NAME = "layer.weight"


def agreement(steps, name=NAME, seed=0):
    """Return the agreement of noisy updates of given lengths along one direction, negative where they are turned."""
    draw = torch.Generator().manual_seed(seed)
    anchor = {key: torch.zeros(8, 8) for key in (name, name.replace("lora_A", "lora_B"))}
    common = {key: torch.randn(8, 8, generator=draw) for key in anchor}
    updates = {
        node: Update({key: step * t + 0.1 * torch.randn(8, 8, generator=draw) for key, t in common.items()}, 10.0)
        for node, step in enumerate(steps)
    }
    getters = {node: partial(updates.__getitem__, node) for node in updates}
    return direction_agreement(getters, {node: Measure(10.0) for node in updates}, anchor)


def weights(steps, name=NAME, seed=0):
    given_weights = agreement(steps, name, seed).weights
    return [given_weights.get(node, 1.0) for node in range(len(steps))]


@given(st.integers(3, 10), st.floats(0.5, 1000.0), st.integers(0, 99), st.sampled_from([NAME, "layer.lora_A.weight"]))
def test_a_long_update_agrees_where_it_points_along_the_others(most, length, seed, name):
    assert agreement([1.0] * most + [length], name, seed).agreeing == set(range(most + 1))
    assert agreement([1.0] * most + [-length], name, seed).agreeing == set(range(most))


@pytest.mark.parametrize("steps", [[1.0], [1.0, -1.0], [0.0] * 4])
def test_nobody_agrees_where_there_is_nobody_to_agree_with(steps):
    assert agreement(steps).agreeing == frozenset()


def test_two_stages_say_together_what_each_says():
    first, second = DirectionAgreement({1: 0.5}, frozenset({2})), DirectionAgreement({1: 0.05}, frozenset({3}))
    assert first | second == DirectionAgreement({1: 0.05}, frozenset({2, 3}))
    assert first | DirectionAgreement() == first


@given(st.integers(7, 10), st.integers(1, 3), st.floats(0.5, 100.0), st.integers(0, 99))
def test_turned_updates_have_the_least_weight_however_long_they_are(most, few, length, seed):
    assert weights([1.0] * most + [-length] * few, seed=seed) == pytest.approx([1.0] * most + [0.05] * few)


def test_the_weight_falls_as_the_update_turns():
    anchor = {NAME: torch.zeros(2, 1)}
    angles = torch.linspace(0, torch.pi, 30)
    moves = [torch.tensor([[1.0], [0.0]])] * 12 + [torch.tensor([[a.cos()], [a.sin()]]) for a in angles]
    found = []
    for move in moves[12:]:
        updates = {node: Update({NAME: m}, 10.0) for node, m in enumerate([*moves[:12], move])}
        getters = {node: partial(updates.__getitem__, node) for node in updates}
        found.append(direction_agreement(getters, {n: Measure(10.0) for n in updates}, anchor).weights.get(12, 1.0))
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (1.0, pytest.approx(0.05))
    assert any(0.1 < weight < 0.9 for weight in found)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([1] * 7 + [-1], "layer.lora_A.weight"),  # few entries, which follow each client's labels
        ([1] * 6 + [-1], NAME),  # too few clients
        ([1] * 4 + [-1] * 4, NAME),  # no majority
        ([1] * 7 + [0], NAME),  # of no direction
    ],
)
def test_all_count_in_full_where_a_direction_tells_nothing(steps, name):
    assert weights(steps, name) == [1.0] * len(steps)


def test_less_weight_is_less_in_every_sum_and_leaves_the_parameters():
    update = Update({NAME: torch.ones(2, 2)}, 10.0)
    taken = Verdict(10.0).with_weight(0.25).apply(update, {NAME: torch.zeros(2, 2)})
    assert taken.examples == 2.5
    assert torch.equal(taken.parameters[NAME], update.parameters[NAME])
    assert Verdict(10.0).with_weight(1.0) == Verdict(10.0)
