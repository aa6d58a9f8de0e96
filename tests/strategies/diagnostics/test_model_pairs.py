from collections.abc import Mapping
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.diagnostics.barrier import along, barriers, midpoint_gap
from fedbasin.strategies.diagnostics.model_pairs import from_fused, pairwise, simplex
from fedbasin.strategies.tensors.state import interpolate
from tests.strategies.diagnostics.models import examples, learnt, on

quickly = settings(max_examples=25, deadline=None)

STATES = {name: learnt(seed) for seed, name in enumerate("abc", 1)}
EVALUATE = on(*examples(1))


class Counted(Mapping):
    """States that are read one by one, as from a disk."""

    def __init__(self, states):
        self.states, self.read = states, []

    def __getitem__(self, name):
        self.read.append(name)
        return self.states[name]

    def __iter__(self):
        return iter(self.states)

    def __len__(self):
        return len(self.states)


def test_every_pair_is_walked_as_if_it_were_alone():
    found = {(pair.a, pair.b): pair.path for pair in pairwise(STATES, EVALUATE, 5)}
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    for (a, b), path in found.items():
        assert path == along(partial(interpolate, STATES[a], STATES[b]), EVALUATE, 5)


def test_pairs_evaluate_every_model_once_and_stream():
    calls = []

    def counted(state):
        calls.append(state)
        return EVALUATE(state)

    states = Counted(STATES)
    pairs = pairwise(states, counted, 5)
    next(pairs)
    assert (len(calls), states.read[-2:]) == (3 + 3, ["a", "b"])
    assert len(list(pairs)) == 2
    assert len(calls) == 3 + 3 * 3


def test_paths_from_the_fused_model_start_in_it():
    fused = interpolate(STATES["a"], STATES["b"], 0.5)
    found = dict(from_fused(fused, STATES, EVALUATE, 3))
    assert list(found) == ["a", "b", "c"]
    for name, path in found.items():
        assert path == along(partial(interpolate, fused, STATES[name]), EVALUATE, 3)
        assert path.loss[0] == EVALUATE(fused)[0]


def test_the_gap_of_a_fusion_equals_a_direct_computation():
    weights = {"a": 10.0, "b": 20.0, "c": 70.0}
    mixed = {name: 0.1 * STATES["a"][name] + 0.2 * STATES["b"][name] + 0.7 * STATES["c"][name] for name in STATES["a"]}
    loss = {name: EVALUATE(state)[0] / 60 for name, state in STATES.items()}
    chord = 0.1 * loss["a"] + 0.2 * loss["b"] + 0.7 * loss["c"]
    found = simplex(STATES, weights, EVALUATE)
    assert found.fusion == pytest.approx(EVALUATE(mixed)[0] / 60 - chord, abs=1e-9)
    for (a, b), gap in found.middles.items():
        (pair,) = pairwise({a: STATES[a], b: STATES[b]}, EVALUATE, 3)
        assert gap == pytest.approx(midpoint_gap(pair.path.points, pair.path.mean_loss), abs=1e-9)
    assert found.barrier == max(found.fusion, *found.middles.values()) > 0.1


def test_two_models_fused_alike_have_the_gap_of_their_middle():
    two = {name: STATES[name] for name in "ab"}
    found = simplex(two, {"a": 3, "b": 3}, EVALUATE)
    assert found.fusion == pytest.approx(found.middles["a", "b"], abs=1e-12)


@quickly
@given(st.integers(0, 2))
def test_a_vertex_has_no_gap_and_a_barrier_is_never_negative(vertex):
    weights = {name: float(i == vertex) for i, name in enumerate(STATES)}
    assert simplex(STATES, weights, EVALUATE).fusion == pytest.approx(0, abs=1e-12)
    assert simplex({"a": STATES["a"]}, {"a": 1}, EVALUATE).barrier == 0


def test_a_convex_loss_has_no_barrier_anywhere():
    states = {name: {"x": torch.tensor([float(i)])} for i, name in enumerate("abc")}
    found = simplex(states, dict.fromkeys("abc", 1.0), lambda s: (float(s["x"] ** 2), 0.0, 1.0))
    assert found.barrier == 0
    assert found.fusion == pytest.approx(1 - 5 / 3)
    walks = pairwise(states, lambda s: (float(s["x"] ** 2), 0.0, 1.0), 5)
    assert all(barriers(pair.path).linear == 0 for pair in walks)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0, "b": 1.0}, "one weight to each"),
        ({"a": 0.0, "b": 0.0, "c": 0.0}, "not all zero"),
        ({"a": 2.0, "b": -1.0, "c": 1.0}, "non-negative"),
        ({"a": float("inf"), "b": 1.0, "c": 1.0}, "non-negative"),
    ],
)
def test_weights_that_are_none_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        simplex(STATES, weights, EVALUATE)


def test_a_model_without_examples_has_no_loss():
    with pytest.raises(ValueError, match="no examples"):
        simplex(STATES, dict.fromkeys("abc", 1.0), lambda state: (0.0, 0.0, 0.0))


def test_counters_of_a_fusion_come_from_the_first_model():
    states = {name: {"x": torch.tensor([2.0 * i]), "steps": torch.tensor(i)} for i, name in enumerate("ab", 1)}
    seen = []
    simplex(states, {"a": 1, "b": 1}, lambda state: (float(seen.append(state) or 0), 0.0, 1.0))
    fused = seen[2]
    assert (float(fused["x"]), int(fused["steps"]), fused["x"].dtype) == (3.0, 1, torch.float32)
