import pytest
import torch
from torch import nn

from fedbasin.strategies.alignment.optimal_transport import soft_fusion, soften
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.discover.tracing import trace
from fedbasin.strategies.symmetry.transform import random


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()


SYMMETRY = trace(mlp(0), torch.zeros(1, 6, dtype=torch.float64))
ANCHOR, CLIENT = (dict(mlp(seed).state_dict()) for seed in (0, 2))


def test_at_a_low_temperature_every_unit_is_nearly_the_one_that_matching_puts_there():
    softened = soften(SYMMETRY, ANCHOR, CLIENT, temperature=0.01)["0.weight"]
    matched = match_weights(SYMMETRY, ANCHOR, CLIENT).state["0.weight"]
    assert torch.equal(torch.cdist(softened, matched).argmin(1), torch.arange(8))


def test_the_same_units_in_another_order_are_brought_back():
    client = random(SYMMETRY, torch.Generator().manual_seed(3)).act(ANCHOR)
    torch.testing.assert_close(soften(SYMMETRY, ANCHOR, client, 0.01), ANCHOR, atol=1e-3, rtol=1e-3)


def test_at_a_high_temperature_every_unit_is_the_mean_unit():
    softened = soften(SYMMETRY, ANCHOR, CLIENT, temperature=1e4)
    mean = CLIENT["0.weight"].mean(0).expand(8, 6)
    torch.testing.assert_close(softened["0.weight"], mean, atol=1e-3, rtol=1e-3)


def test_softening_is_no_symmetry_so_the_function_changes():
    model, inputs = mlp(2), torch.randn(5, 6, dtype=torch.float64)
    before = model(inputs)
    model.load_state_dict(soften(SYMMETRY, ANCHOR, CLIENT, temperature=0.5))
    assert not torch.allclose(model(inputs), before, atol=1e-2)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_fusion_is_the_point_between_the_anchor_and_the_softened_client(share):
    fused = soft_fusion(SYMMETRY, ANCHOR, CLIENT, share)
    softened = soften(SYMMETRY, ANCHOR, CLIENT)
    for name, tensor in fused.items():
        torch.testing.assert_close(tensor, torch.lerp(ANCHOR[name], softened[name], share))


def test_without_temperature_there_is_nothing_soft():
    with pytest.raises(ValueError, match="temperature"):
        soften(SYMMETRY, ANCHOR, CLIENT, 0.0)
