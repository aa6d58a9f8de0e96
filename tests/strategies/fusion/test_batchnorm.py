from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedbasin.proto.layer_graph import BatchNorm
from fedbasin.strategies.fusion.accumulator import Accumulator, fuse
from fedbasin.strategies.fusion.batchnorm import replace_statistics
from fedbasin.strategies.fusion.update import Update

W = torch.float64
NORM = BatchNorm("1", 1e-3)
MEAN, VARIANCE = NORM.statistics


def rows(seed, count, shift=0.0):
    draw = torch.Generator().manual_seed(seed)
    return shift + torch.randn(count, 3, generator=draw, dtype=W)


def said(x):
    """What a client that has read these rows says."""
    return Update({MEAN: x.mean(0), VARIANCE: x.var(0, unbiased=False)}, float(len(x)))


def zero():
    return {MEAN: torch.zeros(3, dtype=W), VARIANCE: torch.ones(3, dtype=W)}


clients = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 20)), min_size=1, max_size=5)


@settings(deadline=None)
@given(clients=clients, apart=st.sampled_from([0.0, 1.0, 1000.0]))
def test_statistics_of_clients_are_those_of_all_their_rows(clients, apart):
    parts = [rows(seed, count, apart * index) for index, (seed, count) in enumerate(clients)]
    fused = fuse(zero(), map(said, parts))
    torch.testing.assert_close(fused[MEAN], torch.cat(parts).mean(0))
    whole = torch.cat(parts).var(0, unbiased=False)
    torch.testing.assert_close(fused[VARIANCE], whole, rtol=1e-6, atol=1e-6 * (apart + 1e-3) ** 2)


@settings(deadline=None)
@given(clients=clients, cut=st.integers(0, 5))
def test_sums_of_statistics_may_be_merged(clients, cut):
    updates = [said(rows(*client)) for client in clients]
    left, right = Accumulator.zero(zero()), Accumulator.zero(zero())
    for update in updates[:cut]:
        left.add(update)
    for update in updates[cut:]:
        right.add(update)
    left.merge(right)
    merged, whole = left.finalize(zero()), fuse(zero(), updates)
    for name in whole:
        torch.testing.assert_close(merged[name], whole[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_variance_is_never_negative(dtype):
    far = {MEAN: torch.full((3,), 1e8), VARIANCE: torch.zeros(3)}
    accumulator = Accumulator.zero(far, dtype)
    for weight in (1.0, 3.0, 7.0):
        accumulator.add(Update(far, weight))
    assert (accumulator.finalize(far)[VARIANCE] >= 0).all()


def test_a_variance_without_a_mean_beside_it_is_a_tensor_as_any_other():
    alone = [{"running_var": torch.tensor([value])} for value in (1.0, 3.0)]
    assert fuse(alone[0], (Update(state, 1.0) for state in alone))["running_var"] == 2


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, eps=NORM.eps), nn.ReLU()).to(W)
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.0, 2.0)
    return net


def loaded(net, state):
    net = deepcopy(net)
    net.load_state_dict(state)
    return net


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), scale=st.sampled_from([0.0, 1e-4, 1.0, 1e4]))
def test_a_restated_model_is_the_same_function(seed, scale):
    net, images = network(seed), torch.randn(4, 2, 6, 6, dtype=W)
    measured = {MEAN: torch.randn(3, dtype=W), VARIANCE: scale * torch.rand(3, dtype=W)}
    again = loaded(net, replace_statistics(net.state_dict(), measured, [NORM]))
    assert torch.equal(again[1].running_mean, measured[MEAN])
    assert torch.equal(again[1].running_var, measured[VARIANCE])
    torch.testing.assert_close(again.eval()(images), net.eval()(images))


def test_a_model_restated_with_what_it_reads_is_the_same_function_in_training_too():
    net, images = network(), torch.randn(50, 2, 6, 6, dtype=W)
    read = net[0](images).detach().transpose(0, 1).flatten(1)
    measured = {MEAN: read.mean(1), VARIANCE: read.var(1, unbiased=False)}
    again = loaded(net, replace_statistics(net.state_dict(), measured, [NORM]))
    torch.testing.assert_close(again.train()(images), net.eval()(images))
    assert not torch.allclose(net.train()(images), net.eval()(images))


def test_other_statistics_alone_are_another_function():
    net, images = network(), torch.randn(4, 2, 6, 6, dtype=W)
    measured = {MEAN: torch.zeros(3, dtype=W), VARIANCE: torch.ones(3, dtype=W)}
    again = loaded(net, replace_statistics(net.state_dict(), measured, []))
    assert not torch.allclose(again.eval()(images), net.eval()(images))


def test_dtypes_and_all_else_stay():
    state = {**network().float().state_dict(), "other": torch.ones(2)}
    measured = {MEAN: torch.zeros(3), VARIANCE: torch.ones(3)}
    found = replace_statistics(state, measured, [NORM])
    assert list(found) == list(state)
    assert all(found[name].dtype == tensor.dtype for name, tensor in state.items())
    changed = {name for name in state if found[name] is not state[name]}
    assert changed == {*NORM.statistics, *NORM.parameters}
