"""Updates against the median client's direction: they take back a part of its step, and nobody is refused."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.influence import Measure, Verdict
from fedbasin.strategies.judging.opposing_updates import cut_opposing

NAME = "layer.weight"


def judged(signs, name=NAME, seed=0):
    """Return the verdicts on noisy updates along one direction, and how far each that is taken moves along it."""
    draw = torch.Generator().manual_seed(seed)
    anchor = {key: torch.zeros(8, 8) for key in (name, name.replace("lora_A", "lora_B"))}
    common = {key: torch.randn(8, 8, generator=draw) for key in anchor}
    updates = {
        node: Update({key: sign * t + 0.1 * torch.randn(8, 8, generator=draw) for key, t in common.items()}, 10.0)
        for node, sign in enumerate(signs)
    }
    getters = {node: partial(updates.__getitem__, node) for node in updates}
    verdicts = cut_opposing(
        {node: Verdict(10.0) for node in updates}, getters, {node: Measure(10.0) for node in updates}, anchor
    )
    direction = common[name] / common[name].square().sum()
    steps = [float((verdicts[n].apply(u, anchor).parameters[name] * direction).sum()) for n, u in updates.items()]
    return verdicts, steps


@given(st.integers(6, 9), st.integers(2, 5), st.floats(0.7, 3.0), st.integers(0, 99))
def test_whoever_moves_against_the_majority_takes_back_a_quarter_of_its_step(most, few, size, seed):
    verdicts, steps = judged([1.0] * most + [-size] * few, seed=seed)
    assert steps[:most] == pytest.approx([1.0] * most, abs=0.1)
    # A quarter of the median client's step, which is shorter than the majority's where a minority is large.
    assert all(-0.3 <= step < 0 for step in steps[most:])
    assert sum(steps) > 0
    assert all(v.refusal is None for v in verdicts.values())
    assert all("cosine" in " ".join(verdicts[node].notes) for node in range(most, most + few))


@pytest.mark.parametrize(
    ("signs", "name"),
    [
        ([1] * 7 + [-1], "layer.lora_A.weight"),  # few entries, which follow each client's labels
        ([1] * 6 + [-1], NAME),  # too few clients
        ([1] * 4 + [-1] * 4, NAME),  # no majority
        ([1] * 7 + [0], NAME),  # of no direction
    ],
)
def test_nothing_is_cut_where_a_direction_tells_nothing(signs, name):
    verdicts, _ = judged(signs, name)
    assert [verdict.update for verdict in verdicts.values()] == [1.0] * len(signs)


def test_what_was_cut_by_its_norm_is_not_cut_less():
    updates = {node: Update({NAME: torch.ones(4, 4) * sign}, 10.0) for node, sign in enumerate([1] * 8 + [-1])}
    verdicts = {node: Verdict(10.0, update=0.1 if node == 8 else 1.0, notes=("update norm",)) for node in updates}
    getters = {node: partial(updates.__getitem__, node) for node in updates}
    cut = cut_opposing(verdicts, getters, {n: Measure(10.0) for n in updates}, {NAME: torch.zeros(4, 4)})
    assert cut == verdicts
