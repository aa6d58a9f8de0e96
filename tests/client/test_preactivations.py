import pytest
import torch
from torch import nn

from fedbasin.strategies.capture.preactivations import preactivation_moments
from fedbasin.strategies.diagnostics.variance_ratios import variance_ratios
from fedbasin.strategies.tensors.batches import Batch
from fedbasin.strategies.tensors.state import interpolate
from tests.strategies.diagnostics.models import examples, learnt, mlp


def batches(seed, count, size=16):
    inputs, targets = examples(seed, count)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def test_moments_equal_a_direct_computation():
    state, (inputs, _) = learnt(1), examples(3, 50)
    found = preactivation_moments(mlp(), state, batches(3, 50))
    assert set(found) == {"0.weight", "2.weight"}
    hidden = inputs @ state["0.weight"].T + state["0.bias"]
    assert found["0.weight"].rows == 50
    torch.testing.assert_close(found["0.weight"].mean, hidden.mean(0))
    torch.testing.assert_close(found["0.weight"].variance, hidden.var(0, correction=0))
    logits = hidden.tanh() @ state["2.weight"].T + state["2.bias"]
    torch.testing.assert_close(found["2.weight"].variance, logits.var(0, correction=0))


def test_moments_of_clients_add_up_to_those_of_their_pooled_data():
    pooled = preactivation_moments(mlp(), learnt(1), batches(1, 20) + batches(2, 50))
    mine, yours = (preactivation_moments(mlp(), learnt(1), b) for b in (batches(1, 20), batches(2, 50)))
    for name, whole in pooled.items():
        summed = mine[name] + yours[name]
        assert summed.rows == whole.rows
        torch.testing.assert_close(summed.variance, whole.variance)


def test_channels_of_a_convolution_are_summed_over_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).double()
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    found = preactivation_moments(model, model.state_dict(), [(images, torch.zeros(5).long())])
    with torch.no_grad():
        output = model[0](images)
    assert found["0.weight"].rows == 5 * 36
    torch.testing.assert_close(found["0.weight"].mean, output.mean((0, 2, 3)))
    torch.testing.assert_close(found["0.weight"].variance, output.var((0, 2, 3), correction=0))


def test_padding_is_left_out():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    inputs, mask = torch.randn(2, 4, 6), torch.tensor([[True] * 4, [True, False, False, False]])
    batch = Batch(inputs, torch.zeros(2, 4).long(), mask)
    found = preactivation_moments(model, model.state_dict(), [batch])
    with torch.no_grad():
        torch.testing.assert_close(found["weight"].mean, model(inputs[mask]).double().mean(0))
    assert found["weight"].rows == 5


def test_the_model_keeps_its_mode_its_weights_and_no_hooks():
    model = mlp(4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    preactivation_moments(model, learnt(1), batches(1, 20))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_models_that_never_met_lose_variance_when_averaged_and_equal_ones_do_not():
    a, b = learnt(1), learnt(2)
    data = batches(1, 60)
    ends = [preactivation_moments(mlp(), state, data) for state in (a, b)]
    mixed = preactivation_moments(mlp(), interpolate(a, b, 0.5), data)
    assert variance_ratios(mixed, ends)["0.weight"].layer < 0.8
    kept = variance_ratios(ends[0], [ends[0], ends[0]])
    assert kept["0.weight"].layer == pytest.approx(1)


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="no examples"):
        preactivation_moments(mlp(), learnt(1), [])
