from dataclasses import replace

import pytest
import torch
from torch import nn

from fedbasin.strategies.alignment.activation_matching import match_activations
from fedbasin.strategies.capture.feature_correlations import correlations
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.symmetry.transform import random
from tests.strategies.alignment.matched_models import EXAMPLES_BY_NAME
from tests.strategies.symmetry.by_hand.prenorm_transformer import preln_transformer
from tests.strategies.symmetry.families import Transformer


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def batches(shape, size, seed=0):
    inputs = torch.randn(shape, generator=drawn(seed), dtype=torch.float64)
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in inputs.split(size)]


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def correlation(a, k):
    a, k = a - a.mean(0), k - k.mean(0)
    return torch.nan_to_num(a / a.norm(dim=0)).T @ torch.nan_to_num(k / k.norm(dim=0))


def test_correlations_are_of_what_is_read_and_what_is_written_breaks_ties():
    anchor, own = mlp(0), mlp(1)
    symmetry = discover(anchor, torch.zeros(1, 5, dtype=torch.float64)).symmetry
    data = batches((50, 5), 50)
    (found,) = correlations(symmetry, mlp(2), anchor.state_dict(), own.state_dict(), data).values()
    written = [model[0](data[0][0]).detach() for model in (anchor, own)]
    expected = correlation(*map(torch.relu, written)) + 1e-3 * correlation(*written)
    torch.testing.assert_close(found[0], expected)


def test_silent_units_are_found_by_what_is_written():
    anchor = mlp(0)
    with torch.no_grad():
        anchor[0].bias[:3] = -100.0
    symmetry = discover(anchor, torch.zeros(1, 5, dtype=torch.float64)).symmetry
    client = random(symmetry, drawn(1)).act(anchor.state_dict())
    found = correlations(symmetry, mlp(), anchor.state_dict(), client, batches((50, 5), 50))
    assert match_activations(symmetry, anchor.state_dict(), client, found).report.distance_after == 0


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()


def test_running_statistics_of_no_model_play_no_part_and_are_kept():
    model = normalised()
    symmetry = discover(model, torch.zeros(2, 5, dtype=torch.float64)).symmetry
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = {**state, "1.running_mean": state["1.running_mean"] + 7}
    found = [correlations(symmetry, model, anchor, state, batches((50, 5), 50)) for anchor in (state, wrong)]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert int(wrong["1.num_batches_tracked"]) == 0


def test_batchnorm_has_no_variance_of_one_example():
    model = normalised()
    symmetry = discover(model, torch.zeros(2, 5, dtype=torch.float64)).symmetry
    with pytest.raises(ValueError, match="batches of two or more"):
        correlations(symmetry, model, *[model.state_dict()] * 2, batches((3, 5), 1))


def test_how_data_falls_into_batches_plays_no_part():
    anchor, own = mlp(0), mlp(1)
    symmetry = discover(anchor, torch.zeros(1, 5, dtype=torch.float64)).symmetry
    states = anchor.state_dict(), own.state_dict()
    whole, split = (correlations(symmetry, mlp(), *states, batches((50, 5), size)) for size in (50, 7))
    torch.testing.assert_close(whole, split)


def test_heads_that_were_exchanged_and_turned_are_found_by_what_they_compute():
    torch.manual_seed(0)
    model = Transformer().double()
    anchor = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    symmetry = preln_transformer(anchor, heads=4, residual=False)
    planted = random(symmetry, drawn(1))
    client = planted.act(anchor)
    found = correlations(symmetry, model, anchor, client, batches((40, 8, 8), 10))
    assert found.keys() == {space.name for space in symmetry.spaces}
    report = match_activations(symmetry, anchor, client, found).report
    assert report.distance_after < 1e-4 * report.distance_before


@pytest.mark.parametrize("name", ["gpt2", "attention"])
@pytest.mark.filterwarnings("ignore")
def test_fused_projections_show_what_they_write(name):
    example = EXAMPLES_BY_NAME[name]
    model = example.model()
    anchor = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    symmetry = discover(model, example.inputs(2, drawn(0))).symmetry
    # Features that fill five of eight dimensions do not tell how the other three rotate.
    symmetry = replace(symmetry, spaces=tuple(space for space in symmetry.spaces if space.name != "first"))
    client = random(symmetry, drawn(1)).act(anchor)
    found = correlations(symmetry, model, anchor, client, example.batches(0))
    assert found.keys() == {space.name for space in symmetry.spaces}
    report = match_activations(symmetry, anchor, client, found).report
    assert report.distance_after < 1e-4 * report.distance_before


def test_padding_does_not_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).double()
    symmetry = parse("embedded S(4) 0.weight[1] 1.weight[1]")
    state = model.state_dict()
    tokens = torch.randint(0, 9, (6, 5), generator=drawn(0))
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[:, 3:] = False
    targets = torch.zeros(6, 5, dtype=torch.long)
    padded = correlations(symmetry, model, state, state, [(tokens, targets, mask)])
    short = correlations(symmetry, model, state, state, [(tokens[:, :3], targets[:, :3])])
    torch.testing.assert_close(padded, short)


def test_a_space_that_no_module_writes_is_left_out():
    model = mlp()
    symmetry = parse("inputs S(5) 0.weight[1]")
    assert not correlations(symmetry, model, *[model.state_dict()] * 2, batches((9, 5), 9))


def test_the_model_is_left_as_it_was():
    model, own = mlp(0), mlp(1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    symmetry = discover(model, torch.zeros(1, 5, dtype=torch.float64)).symmetry
    model.train()
    correlations(symmetry, model, mlp(2).state_dict(), own.state_dict(), batches((9, 5), 9))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(before, dict(model.state_dict()), rtol=0, atol=0)


def test_without_data_there_is_nothing_to_correlate():
    model = mlp()
    symmetry = discover(model, torch.zeros(1, 5, dtype=torch.float64)).symmetry
    with pytest.raises(ValueError, match="no examples"):
        correlations(symmetry, model, *[model.state_dict()] * 2, [])
