"""The first local steps, with the optimizer that an app has used itself."""

import math
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedbasin.client.refit.local_steps import MOST_STEPS, LocalOptimizer, seeing_optimizer, stepped, trial
from fedbasin.strategies.tasks.model_task import TASKS

TASK = TASKS["classification"]
INPUTS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
BATCHES = [(part, part[:, :3].argmax(1)) for part in INPUTS.split(10)]
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.9)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "Adam, rate a tensor": lambda p: torch.optim.Adam(p, torch.tensor(0.01)),
}


class Own(torch.optim.SGD):
    """An optimizer that is not torch's."""


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def steps(model, optimizer, count):
    for inputs, targets in BATCHES[:count]:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def seen(make, count=4):
    model = net()
    with seeing_optimizer() as local:
        steps(model, make(model.parameters()), count)
    return LocalOptimizer.from_json(local.to_json())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_that_was_seen_takes_the_steps_of_the_apps_own(make):
    local = seen(make)
    assert local.steps == 4
    ours, theirs = net(1), net(1)
    steps(ours, local.make(ours), 3)
    steps(theirs, make(theirs.parameters()), 3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_model_after_steps_is_the_one_that_the_app_would_reach():
    start, batches = net(2).state_dict(), BATCHES[:1]
    end = stepped(net(1), start, batches, seen(OPTIMIZERS["SGD"], count=1), 0, TASK)
    model = net(2)
    steps(model, OPTIMIZERS["SGD"](model.parameters()), 1)
    torch.testing.assert_close(end, dict(model.state_dict()))


@pytest.mark.parametrize("local", [LocalOptimizer(), seen(lambda p: Own(p, 0.1))], ids=["none", "unknown"])
def test_without_an_optimizer_the_model_stays(local):
    start = net(2).state_dict()
    end = stepped(net(1), start, BATCHES, local, 0, TASK)
    assert all(torch.equal(end[name], start[name]) for name in start)


def test_a_model_that_is_frozen_as_it_is_made_takes_no_steps():
    frozen = net().requires_grad_(False)
    losses = trial(frozen, net(2).state_dict(), BATCHES, BATCHES, seen(OPTIMIZERS["SGD"]), 0, TASK)
    assert losses.loss_after[0] == losses.loss_after[1]


def test_the_largest_learning_rate_of_a_schedule_counts():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: (0.1, 1.0, 0.01)[epoch])
    with seeing_optimizer() as local:
        for _ in range(2):
            steps(model, optimizer, 1)
            schedule.step()
    steps(model, optimizer, 1)  # not seen: the context is closed
    assert (local.settings["lr"], local.steps) == (0.1, 2)


@pytest.mark.parametrize("make", [lambda p: Own(p, 0.1), lambda p: torch.optim.LBFGS(p, 0.1)])
def test_an_optimizer_that_cannot_be_built_anew_is_not_seen(make):
    model = net()
    with seeing_optimizer() as local:
        optimizer = make(model.parameters())
        optimizer.step(lambda: cross_entropy(model(INPUTS), INPUTS[:, :3].argmax(1)))
    assert not local.name


KINDS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "Optimizer"])
def test_every_optimizer_of_torch_is_built_anew_or_not_seen(name):
    model = net()
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1 or name != "Muon"]
    optimizer = getattr(torch.optim, name)(weights, lr=0.01)
    with seeing_optimizer() as local:
        if name == "SparseAdam":
            for parameter in weights:
                parameter.grad = torch.ones_like(parameter).to_sparse()
            optimizer.step()
        else:
            optimizer.step(lambda: cross_entropy(model(INPUTS), INPUTS[:, :3].argmax(1)))
    local = LocalOptimizer.from_json(local.to_json())
    assert bool(local.name) == (name not in ("LBFGS", "SparseAdam", "Muon"))
    sums = tried(local, net(2).state_dict())
    assert (sums.loss_after[-1] == sums.loss_after[0]) == (not local.name)


def test_optimizers_of_several_kinds_are_none_that_can_be_built_anew():
    model = net()
    first, second = torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(model.parameters(), 0.1)
    with seeing_optimizer() as local:
        for optimizer in (first, second, second, first):
            steps(model, optimizer, 1)
    assert (local.name, local.steps) == ("", 4)


def tried(local, start):
    return trial(net(), start, BATCHES, BATCHES, local, 7, TASK)


def test_steps_lower_the_loss_of_a_model_that_suits_the_learning_rate():
    sums = tried(seen(OPTIMIZERS["SGD"], 40), net(2).state_dict())
    assert (sums.points, sums.loss_before, sums.examples) == ((0.0, 1.0), (), 40)
    assert sums.loss_after[1] < sums.loss_after[0]
    assert sums == tried(seen(OPTIMIZERS["SGD"], 40), net(2).state_dict())


def test_steps_from_a_head_that_is_too_large_show_a_loss_that_can_be_sent():
    large = {name: 1e25 * tensor if name.startswith("2.") else tensor for name, tensor in net(2).state_dict().items()}
    sums = tried(seen(OPTIMIZERS["SGD"], MOST_STEPS), large)
    assert sums.loss_after[1] > sums.loss_after[0]
    assert all(map(math.isfinite, sums.loss_after))


def test_without_an_optimizer_nothing_moves():
    sums = tried(LocalOptimizer(), net(2).state_dict())
    assert len(set(sums.loss_after)) == 1


def test_a_trial_draws_nothing_of_the_apps():
    local, state, model = seen(OPTIMIZERS["SGD"]), net(2).state_dict(), nn.Sequential(net(), nn.Dropout(0.5))
    start = {f"0.{name}": tensor for name, tensor in state.items()}
    drawn = torch.random.get_rng_state()
    trial(model, start, BATCHES, BATCHES, local, 7, TASK)
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_steps_are_taken_on_small_parts_of_large_and_sorted_batches():
    class Seeing(nn.Linear):
        def forward(self, inputs):
            if self.training:
                parts.append(sorted(inputs[:, 0].tolist()))
            return super().forward(inputs)

    parts = []
    inputs = torch.arange(100.0).unsqueeze(1) / 100
    batches = [(inputs, (inputs[:, 0] > 0.5).long())]
    model = Seeing(1, 2)
    local = seen(OPTIMIZERS["SGD"])
    trial(model, model.state_dict(), batches, batches, local, 7, TASK)
    assert len(parts) == local.steps == 4
    assert all(len(part) == 25 and part[0] < 0.05 and part[-1] > 0.95 for part in parts)
    assert sorted(chain(*parts)) == inputs[:, 0].tolist()


def test_steps_on_a_graph_are_taken_on_all_of_it():
    class Graph(nn.Linear):
        def forward(self, x, edges):
            sizes.append(len(x))
            return super().forward(x).index_add(0, edges[1], x[edges[0]])

    sizes = []
    x, edges = torch.randn(100, 3), torch.randint(100, (2, 40))
    model, batches = Graph(3, 3), [({"x": x, "edges": edges}, x.argmax(1))]
    sums = trial(model, model.state_dict(), batches, batches, seen(OPTIMIZERS["SGD"]), 7, TASK)
    assert set(sizes) == {100}
    assert sums.loss_after[1] < sums.loss_after[0]
