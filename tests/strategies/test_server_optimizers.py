"""Server optimizers: their laws, and Flower's own on the same numbers."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.strategies.server_optimizers import SERVER_OPTIMIZERS, Adam, Average, Ema, Momentum, Replace, Yogi
from fedbasin.strategies.tensors.state import distance
from tests.server.fake_grid import FakeGrid

W = torch.float64
ROUNDS = 4


def state(seed, dtype=W):
    draw = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 2, generator=draw, dtype=W).to(dtype),
        "bias": torch.randn(3, generator=draw, dtype=W).to(dtype),
    }


def counted(seed, dtype=W):
    return {**state(seed, dtype), "count": torch.tensor(seed)}


def models_of(optimizer, fused, start):
    """The global models of all rounds; what clients fuse to does not depend on them here."""
    model, optimizer_state, found = start, {}, []
    for number, target in enumerate(fused, start=1):
        model, optimizer_state = optimizer(model, target, number, optimizer_state)
        found.append(model)
    return found


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS.values(), ids=SERVER_OPTIMIZERS)
class TestLaws:
    def test_a_fused_model_equal_to_the_global_one_leaves_it(self, optimizer):
        model = counted(1)
        found, _ = optimizer(model, dict(model), 1, {})
        assert_same(found, model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtypes_stay(self, optimizer, dtype):
        for found in models_of(optimizer, [counted(2, dtype), counted(3, dtype)], counted(1, dtype)):
            assert {name: tensor.dtype for name, tensor in found.items()} == {
                "weight": dtype,
                "bias": dtype,
                "count": torch.int64,
            }

    def test_what_is_no_floating_point_is_the_fused_models(self, optimizer):
        found = models_of(optimizer, [counted(2), counted(3)], counted(1))
        assert [int(model["count"]) for model in found] == [2, 3]

    def test_names_stay_in_their_order(self, optimizer):
        found, _ = optimizer(counted(1), counted(2), 1, {})
        assert list(found) == list(counted(1))

    def test_nothing_that_goes_in_is_changed(self, optimizer):
        model, fused = counted(1), counted(2)
        after, optimizer_state = optimizer(model, fused, 1, {})
        kept = {name: tensor.clone() for name, tensor in optimizer_state.items()}
        optimizer(after, counted(3), 2, optimizer_state)
        assert_same(model, counted(1))
        assert_same(fused, counted(2))
        assert_same(optimizer_state, kept)

    def test_the_first_step_goes_towards_the_fused_model(self, optimizer):
        model, fused = state(1), state(2)
        found, _ = optimizer(model, fused, 1, {})
        for name in model:
            assert ((found[name] - model[name]) * (fused[name] - model[name]) > 0).all()


@given(lr=st.floats(0.0, 1.0))
def test_replacing_goes_that_share_of_the_way(lr):
    found, optimizer_state = Replace(lr)(state(1), state(2), 3, {})
    for name, tensor in state(1).items():
        torch.testing.assert_close(found[name], (1 - lr) * tensor + lr * state(2)[name])
    assert optimizer_state == {}


@pytest.mark.parametrize("optimizer", [Replace(), Average(), Ema()])
def test_the_first_rounds_model_stands_alone(optimizer):
    found, optimizer_state = optimizer(state(1), state(2), 1, {})
    assert all(torch.equal(found[name], state(2)[name]) for name in found)
    assert optimizer_state == {}


@given(rounds=st.integers(1, 8))
def test_the_average_over_rounds_is_the_mean_of_their_fused_models(rounds):
    fused = [state(seed) for seed in range(2, 2 + rounds)]
    last = models_of(Average(), fused, state(1))[-1]
    for name in last:
        mean = torch.stack([target[name] for target in fused]).mean(0)
        torch.testing.assert_close(last[name], mean)


def test_the_exponential_mean_forgets_by_its_decay():
    first, second = models_of(Ema(0.8), [state(2), state(3)], state(1))
    for name in first:
        torch.testing.assert_close(second[name], 0.8 * first[name] + 0.2 * state(3)[name])


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS.values(), ids=SERVER_OPTIMIZERS)
def test_rounds_that_end_in_the_same_model_converge_to_it(optimizer):
    fused = [state(2)] * 400
    last = models_of(optimizer, fused, state(1))[-1]
    assert distance(last, state(2)) < 0.05 * distance(state(1), state(2))


def test_momentum_without_memory_is_replacing():
    fused = [state(seed) for seed in (2, 3, 4)]
    for ours, theirs in zip(
        models_of(Momentum(0.0, 0.5), fused, state(1)), models_of(Replace(0.5), fused, state(1)), strict=True
    ):
        assert_same(ours, theirs)


class Flower:
    """One of Flower's strategies, given the same fused models, as the reply of a single client."""

    def __init__(self, strategy):
        self.strategy = strategy
        strategy.min_available_nodes = strategy.min_train_nodes = 1
        self.grid = FakeGrid([7], lambda message: None)

    def walk(self, fused, start):
        arrays, found = as_record(start), []
        for number, target in enumerate(fused, start=1):
            (asked,) = self.strategy.configure_train(number, arrays, ConfigRecord(), self.grid)
            content = {"arrays": as_record(target), "metrics": MetricRecord({"num-examples": 1})}
            reply = Message(RecordDict(content), reply_to=asked)
            arrays, _ = self.strategy.aggregate_train(number, [reply])
            found.append({name: torch.from_numpy(a.numpy()) for name, a in arrays.items()})
        return found


def as_record(state):
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.items()})


FUSED = [state(seed) for seed in range(2, 2 + ROUNDS)]


def test_momentum_is_flowers_own():
    theirs = Flower(FedAvgM(server_learning_rate=0.7, server_momentum=0.9)).walk(FUSED, state(1))
    for ours, other in zip(models_of(Momentum(0.9, 0.7), FUSED, state(1)), theirs, strict=True):
        assert_same(ours, other)


TAU = 1e-9  # so small that where the mean square begins does not show


def test_yogi_is_flowers_own():
    """Flower begins its mean square at zero, and ours at tau squared, as its paper does."""
    theirs = Flower(FedYogi(eta=0.1, beta_1=0.9, beta_2=0.99, tau=TAU)).walk(FUSED, state(1))
    for ours, other in zip(models_of(Yogi(0.1, 0.9, 0.99, TAU), FUSED, state(1)), theirs, strict=True):
        assert_same(ours, other)


def test_adam_is_flowers_own_but_for_its_bias_correction():
    """Flower multiplies the rate of round r by sqrt(1 - beta2^(r+1)) / (1 - beta1^(r+1)), which Reddi et al. do not.

    One round at a time from the same model, so that the factor is the only difference.
    """
    adam = Adam(0.1, 0.9, 0.99, TAU)
    flower = Flower(FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, tau=TAU))
    start, optimizer_state = state(1), {}
    before = start
    for number, (target, theirs) in enumerate(zip(FUSED, flower.walk(FUSED, start), strict=True), start=1):
        ours, optimizer_state = adam(before, target, number, optimizer_state)
        factor = np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        for name in ours:
            moved = factor * (ours[name] - before[name])
            torch.testing.assert_close(theirs[name] - before[name], moved)
        before = theirs


@pytest.mark.parametrize("optimizer", [Momentum(), Adam(), Yogi()])
def test_what_a_model_measured_is_the_fused_models_and_no_direction_to_go_on_in(optimizer):
    def measured(seed, variance):
        return {**state(seed), "norm.running_var": torch.tensor([variance]), "norm.running_mean": torch.zeros(1)}

    fused = [measured(seed, variance) for seed, variance in ((1, 0.5), (2, 0.1), (3, 0.05))]
    found = models_of(optimizer, fused, measured(0, 1.0))
    assert [float(model["norm.running_var"]) for model in found] == pytest.approx([0.5, 0.1, 0.05])
    assert not torch.equal(found[-1]["weight"], fused[-1]["weight"])


def test_momentum_would_take_a_variance_below_zero():
    fused = [{"variance": torch.tensor([v])} for v in (0.5, 0.1, 0.05)]
    assert models_of(Momentum(), fused, {"variance": torch.ones(1)})[-1]["variance"] < 0
