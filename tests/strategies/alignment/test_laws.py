"""What every matcher keeps, whatever it maximises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.alignment.activation_matching import match_activations
from fedbasin.strategies.alignment.graph_matching import match_graph
from fedbasin.strategies.alignment.identity_bound import identity_bounds
from fedbasin.strategies.alignment.sinkhorn import match_sinkhorn
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.capture.feature_correlations import correlations
from fedbasin.strategies.symmetry.transform import random
from fedbasin.strategies.tensors.state import distance
from tests.strategies.alignment.test_weight_matching import drawn, equal, family, near, planted, symmetry_of
from tests.strategies.symmetry.families import FAMILIES

few = settings(max_examples=4, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def by_weights(name, symmetry, anchor, client):
    return match_weights(symmetry, anchor, client)


def by_weights_with_bounds(name, symmetry, anchor, client):
    return match_weights(symmetry, anchor, client, identity_bounds(symmetry, anchor))


def by_sinkhorn(name, symmetry, anchor, client):
    return match_sinkhorn(symmetry, anchor, client)


def by_graph(name, symmetry, anchor, client):
    return match_graph(symmetry, anchor, client)


def by_activations(name, symmetry, anchor, client):
    found = correlations(symmetry, symmetry_of(name)[1], anchor, client, batches(name))
    return match_activations(symmetry, anchor, client, found)


def batches(name):
    example = FAMILIES[name][1]
    inputs = torch.cat([example] * 40)
    if inputs.is_floating_point():
        inputs = torch.randn(inputs.shape, generator=drawn(9))
    else:
        inputs = inputs[torch.randperm(len(inputs), generator=drawn(9))]
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in inputs.split(32)]


MATCHERS = [by_weights, by_weights_with_bounds, by_sinkhorn, by_graph, by_activations]
# Without a space on both axes of a tensor, which no matcher promises to undo.
PLANTED = ["mlp", "convnet"]
every_matcher = pytest.mark.parametrize("match", MATCHERS)


@every_matcher
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_transform_is_undone(match, name):
    symmetry, anchor = family(name)
    for i in range(len(symmetry.spaces)):
        client = planted(symmetry, i, seed=i).act(anchor)
        found = match(name, symmetry, anchor, client)
        assert equal(found.state, anchor)
        assert found.report.distance_after == 0 < found.report.distance_before


@every_matcher
@pytest.mark.parametrize("name", FAMILIES)
@few
@given(seed=seeds)
def test_aligning_twice_changes_nothing(match, name, seed):
    symmetry, anchor = family(name)
    _, client = family(name, seed)
    found = match(name, symmetry, anchor, client)
    again = match(name, symmetry, anchor, found.state)
    assert again.transform.is_identity
    assert equal(again.state, found.state)


@every_matcher
@pytest.mark.parametrize("name", FAMILIES)
@few
@given(seed=seeds)
def test_nothing_gets_worse_and_the_report_says_what_happened(match, name, seed):
    symmetry, anchor = family(name)
    _, client = family(name, seed)
    found = match(name, symmetry, anchor, client)
    report = found.report
    assert report.distance_after <= report.distance_before * (1 + 1e-6)
    assert all(space.gain >= 0 for space in report.spaces)
    assert distance(found.transform.act(client), found.state) < 1e-3
    assert [space.space for space in report.spaces] == [space.name for space in symmetry.spaces]
    counted = {m.tensor for space in symmetry.spaces for m in space.axes if not m.scored}
    left, right = ({n: t for n, t in s.items() if n not in counted} for s in (anchor, found.state))
    assert report.distance_after == pytest.approx(distance(left, right), rel=1e-5, abs=1e-6)


@every_matcher
@pytest.mark.parametrize("name", FAMILIES)
def test_ties_go_to_the_identity(match, name):
    symmetry, anchor = family(name)
    for space in symmetry.spaces:
        for axis in space.axes:
            units = anchor[axis.tensor] = anchor[axis.tensor].clone()
            units.narrow(axis.dim, 0, units.shape[axis.dim] // 2).zero_()
    assert match(name, symmetry, anchor, dict(anchor)).transform.is_identity


@every_matcher
def test_a_client_near_the_anchor_stays(match):
    symmetry, anchor = family("mlp")
    assert match("mlp", symmetry, anchor, near(anchor, 1e-3, 1)).transform.is_identity


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and a torch built for it")
@every_matcher
@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_states_on_a_gpu_are_aligned_there_as_on_the_cpu(match, name):  # pragma: no cover - needs a GPU
    symmetry, anchor = family(name)
    client = random(symmetry, drawn(3)).act(near(anchor, 0.1, 4))
    here = match(name, symmetry, anchor, client)
    placed = ({n: t.cuda() for n, t in state.items()} for state in (anchor, client))
    if match is by_activations:
        symmetry_of(name)[1].cuda()
    try:
        there = match(name, symmetry, *placed)
    finally:
        symmetry_of(name)[1].cpu()
    assert all(tensor.is_cuda for tensor in there.state.values())
    back = {n: t.cpu() for n, t in there.state.items()}
    torch.testing.assert_close(back, here.state, rtol=1e-3, atol=1e-3)


def test_features_that_are_no_numbers_are_refused_by_their_space():
    symmetry, anchor = family("convnet")
    broken = {n: t * float("nan") if n.endswith("conv1.weight") else t for n, t in anchor.items()}
    with pytest.raises(ValueError, match=r"features of the anchor or of the client.*not finite"):
        by_activations("convnet", symmetry, anchor, broken)
