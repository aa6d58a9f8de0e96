from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from fedbasin.client.measure.loss_path import path_losses
from fedbasin.client.measure.train_bend import curve_losses, train_bend
from fedbasin.strategies.diagnostics.barrier import linear_barrier
from fedbasin.strategies.diagnostics.bent_paths import straight
from tests.strategies.diagnostics.models import examples, learnt, mlp

A, B = learnt(1), learnt(2)
DATA = examples(0, 200)
BATCHES = list(zip(DATA[0].split(50), DATA[1].split(50), strict=True))
KINDS = ("bezier", "chain")


def barrier(path):
    return linear_barrier(path.points, path.mean_loss)


@pytest.mark.parametrize("kind", KINDS)
def test_without_steps_the_curve_is_the_straight_line(kind):
    curve = train_bend(mlp(), A, B, BATCHES, kind, steps=0)
    bent = curve_losses(mlp(), curve, BATCHES, 5)
    line = path_losses(mlp(), A, B, BATCHES, 5)
    assert bent.loss == pytest.approx(line.loss, rel=1e-9)
    assert bent.correct == line.correct


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", [partial(Adam), partial(SGD, momentum=0.9)])
@pytest.mark.parametrize("seed", range(3))
def test_a_trained_bend_is_never_higher_than_the_straight_line(kind, optimizer, seed):
    curve = train_bend(
        mlp(), A, B, BATCHES, kind, steps=80, lr=0.03, seed=seed, optimizer=optimizer
    )
    bent, line = (curve_losses(mlp(), c, BATCHES, 11) for c in (curve, straight(A, B)))
    assert max(bent.loss) <= max(line.loss) + 1e-9
    assert sum(bent.loss) < sum(line.loss)


def test_a_bend_avoids_a_barrier_that_the_line_crosses():
    curve = train_bend(mlp(), A, B, BATCHES, steps=300, lr=0.03)
    line = barrier(path_losses(mlp(), A, B, BATCHES, 11))
    assert line > 0.5
    assert barrier(curve_losses(mlp(), curve, BATCHES, 11)) < line / 3


def test_a_bend_is_the_same_for_a_seed_and_another_for_another():
    bends = [train_bend(mlp(), A, B, BATCHES, steps=5, seed=seed).bend for seed in (3, 3, 4)]
    assert all(torch.equal(bends[0][name], bends[1][name]) for name in A)
    assert not torch.equal(bends[0]["0.weight"], bends[2]["0.weight"])


def test_nothing_but_the_bend_is_changed():
    model = nn.Sequential(mlp(), nn.Dropout(0.5)).train()
    wrap = {f"0.{name}": tensor.clone() for name, tensor in A.items()}
    end = {f"0.{name}": tensor.clone() for name, tensor in B.items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    curve = train_bend(model, wrap, end, BATCHES, steps=5)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(wrap[f"0.{n}"], A[n]) and torch.equal(end[f"0.{n}"], B[n]) for n in A)
    assert all(
        torch.equal(curve.at(0)[n], wrap[n]) and torch.equal(curve.at(1)[n], end[n]) for n in wrap
    )
    assert not any(tensor.requires_grad for tensor in curve.bend.values())


def test_running_statistics_and_counters_are_not_trained():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    end = {
        **start,
        "1.running_mean": torch.full((3,), 2.0).double(),
        "1.num_batches_tracked": torch.tensor(7),
    }
    bend = train_bend(model, start, end, BATCHES, steps=3).bend
    assert bend["1.running_mean"].tolist() == [1, 1, 1]
    assert int(bend["1.num_batches_tracked"]) == 7
    assert not torch.equal(bend["0.weight"], start["0.weight"])


def test_tied_weights_bend_as_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, inputs):
            return self.second(self.first(inputs).tanh())

    torch.manual_seed(0)
    ends = [Tied().double().state_dict() for _ in range(2)]
    curve = train_bend(Tied().double(), *ends, BATCHES, steps=3)
    assert set(curve.bend) == {"first.weight", "first.bias", "second.bias"}
    assert curve_losses(Tied().double(), curve, BATCHES, 3).examples == 200


def test_curves_of_clients_add_up_to_the_curve_of_their_pooled_data():
    curve = train_bend(mlp(), A, B, BATCHES, steps=5)
    parts = [curve_losses(mlp(), curve, part, 5) for part in (BATCHES[:1], BATCHES[1:])]
    assert (parts[0] + parts[1]).loss == pytest.approx(curve_losses(mlp(), curve, BATCHES, 5).loss)


def test_a_learning_rate_that_breaks_the_bend_is_named():
    with pytest.raises(ValueError, match="smaller learning rate"):
        train_bend(mlp(), A, B, BATCHES, steps=50, lr=float("inf"), optimizer=SGD)


def test_batches_that_can_be_read_once_are_refused():
    with pytest.raises(TypeError, match="list or a DataLoader"):
        train_bend(mlp(), A, B, iter(BATCHES))
    with pytest.raises(TypeError, match="list or a DataLoader"):
        curve_losses(mlp(), straight(A, B), iter(BATCHES), 3)


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="no examples"):
        train_bend(mlp(), A, B, [])
