import pytest
import torch

from fedbasin.proto.report import Decision
from fedbasin.strategies.alignment.identity_bound import identity_bounds
from fedbasin.strategies.alignment.transformed_state import TransformedState
from fedbasin.strategies.alignment.weight_matching import distances, find_by_weights, match_weights
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.symmetry.transform import random
from tests.strategies.alignment.test_weight_matching import drawn, equal, family, near


class Stored(dict):
    """A state of which at most one tensor at a time is out of its file."""

    def __init__(self, state):
        super().__init__(state)
        self.reads = 0

    def __getitem__(self, name):
        self.reads += 1
        return super().__getitem__(name).clone()

    def items(self):
        raise AssertionError("all tensors at once")

    values = copy = items


def test_what_was_decided_says_why():
    symmetry, anchor = family("mlp")
    client = near(anchor, 1e-3, 1)
    bounds = identity_bounds(symmetry, anchor)
    proven = match_weights(symmetry, anchor, client, bounds).report
    searched = match_weights(symmetry, anchor, client).report
    moved = match_weights(symmetry, anchor, random(symmetry, drawn(1)).act(anchor), bounds).report
    decisions = [report.decision for report in (proven, searched, moved)]
    assert decisions == [Decision.certified, Decision.identity, Decision.aligned]


def test_states_in_files_are_read_tensor_by_tensor_and_never_whole():
    symmetry, anchor = family("mlp")
    client = random(symmetry, drawn(2)).act(near(anchor, 0.1, 3))
    found = find_by_weights(symmetry, Stored(anchor), Stored(client))
    known = match_weights(symmetry, anchor, client)
    assert equal(found.transform.act(client), known.state)
    assert found.report == known.report


def test_a_state_is_moved_when_it_is_read():
    symmetry, anchor = family("convnet")
    transform = random(symmetry, drawn(4))
    moved = TransformedState(symmetry, anchor, {})
    assert moved["bn1.bias"] is anchor["bn1.bias"]
    moved.elements.update(transform.elements)
    assert equal(dict(moved), transform.act(anchor))
    assert len(moved) == len(anchor)


def test_only_tensors_of_spaces_that_moved_are_touched():
    symmetry = parse("a S(2) u[0]\nb S(2) v[0]")
    state = {"u": torch.eye(2), "v": torch.eye(2), "w": torch.eye(2)}
    (first, _) = symmetry.spaces
    moved = TransformedState(symmetry, state, {"a": first.group.random(drawn(0))})
    assert [moved.is_touched(name) for name in state] == [True, False, False]


def test_a_part_that_does_not_count_in_matching_has_no_distance():
    symmetry = parse("h  S(2)  a[0] b[0,0:2] (b[0,2:4])")
    anchor = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    client = {"a": torch.ones(2, 3), "b": torch.tensor([3.0, 4.0, 50.0, 60.0])}
    assert distances(symmetry, anchor, client) == pytest.approx({"a": 6**0.5, "b": 5.0})
