"""The first steps of a client's local training, taken with the optimizer that the app itself has used.

An app trains by code of its own. While it does, a hook of torch sees its optimizer: class, settings, number of steps.
A trial builds the same optimizer anew and takes the first steps from a model, so that it shows whether the app's own
learning rate suits that model. An app whose training uses no optimizer of torch cannot be tried, and no model but the
mean of the clients' is trained on.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fedbasin.proto.report import PathSums
from fedbasin.strategies.diagnostics.evaluation import Score, evaluate
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batch, Batches, forward, in_mode, read_batches
from fedbasin.strategies.tensors.state import State

# Steps of a trial: the app's own, and no more than these. The first steps of Adam are as large as the learning rate in
# every parameter, so that any new head is worse after ten of them, and many are better after forty.
MOST_STEPS = 40

# Examples of a step. Batches of data are as large as statistics want them, and the app's own may be smaller.
_EXAMPLES = 32

# Optimizers whose step needs more than gradients, or that take only some parameters of a model.
_UNFIT = ("LBFGS", "SparseAdam", "Muon")

# The loss of an example that stands for any larger one, and for one that is not a number.
_LARGEST_LOSS = 1e30


@dataclass(eq=False)
class LocalOptimizer:
    """The optimizer of an app's own training.

    Attributes:
        name: name of its class in `torch.optim`; empty where none was seen, several kinds, or one that cannot be built
            anew.
        settings: settings of its first group of parameters, with the largest learning rate.
        steps: number of steps.
    """

    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 0

    def see(self, optimizer: Optimizer, *_: object) -> None:
        """Take note of a step."""
        kind = type(optimizer)
        name = kind.__name__ if getattr(torch.optim, kind.__name__, None) is kind else ""
        if name in _UNFIT or (self.steps and name != self.name):
            name = ""
        group = {key: value for key, value in optimizer.param_groups[0].items() if key in optimizer.defaults}
        settings = {key: float(value) if isinstance(value, torch.Tensor) else value for key, value in group.items()}
        largest = max(settings.get("lr", 0.0), self.settings.get("lr", 0.0))
        self.name, self.settings, self.steps = name, {**settings, "lr": largest} if name else {}, self.steps + 1

    def make(self, model: nn.Module) -> Optimizer:
        """Return the same optimizer for the parameters of a model, without any memory."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer: Optimizer = getattr(torch.optim, self.name)(parameters, lr=self.settings["lr"])
        for group in optimizer.param_groups:
            group.update(self.settings)
        return optimizer

    def to_json(self) -> str:
        return json.dumps([self.name, self.settings, self.steps])

    @classmethod
    def from_json(cls, text: str) -> "LocalOptimizer":
        return cls(*json.loads(text))


@contextmanager
def seeing_optimizer() -> Iterator[LocalOptimizer]:
    """See the optimizer that steps while a context is open."""
    local = LocalOptimizer()
    handle = register_optimizer_step_post_hook(local.see)
    try:
        yield local
    finally:
        handle.remove()


def trial(
    model: nn.Module, state: State, data: Batches, held_out: Batches, optimizer: LocalOptimizer, seed: int, task: Task
) -> PathSums:
    """Return the losses of a model before a client's first local steps from it (t = 0) and after them (t = 1).

    Args:
        model: module that runs the states; its tensors are replaced.
        state: the model.
        data: batches that the steps are taken on.
        held_out: batches that losses are measured on.
        optimizer: the optimizer of the app's own training.
        seed: seed of what the model draws in training.
        task: the task, which gives the loss.
    """
    before = evaluate(model, state, held_out, task)
    _take_steps(model, state, data, optimizer, seed, task)
    scores = [before, evaluate(model, model.state_dict(), held_out, task)]
    return PathSums((0.0, 1.0), (), _losses(scores), (), _correct(scores), before.examples, clients=1)


def stepped(
    model: nn.Module, state: State, data: Batches, optimizer: LocalOptimizer, seed: int, task: Task
) -> dict[str, Tensor]:
    """Return the model in which a client's first local steps from another one end; the same one where it takes none.

    Args:
        model: module that runs the states; its tensors are replaced.
        state: the model.
        data: batches that the steps are taken on.
        optimizer: the optimizer of the app's own training.
        seed: seed of what the model draws in training.
        task: the task, which gives the loss.
    """
    _take_steps(model, state, data, optimizer, seed, task)
    tensors = model.state_dict()
    return {name: tensors[name].detach().to("cpu", tensor.dtype) for name, tensor in state.items()}


def _take_steps(
    model: nn.Module, state: State, data: Batches, optimizer: LocalOptimizer, seed: int, task: Task
) -> None:
    model.load_state_dict({**model.state_dict(), **state})
    # A model that is frozen as it is made can be tried no better than one of an app without an optimizer.
    if not optimizer.name or not any(parameter.requires_grad for parameter in model.parameters()):
        return
    stepping = optimizer.make(model)
    batches = cycle(_small_batches(data, model, seed))
    # What the app draws must not depend on a trial.
    with torch.random.fork_rng(), in_mode(model, training=True), torch.enable_grad():
        torch.manual_seed(seed % 2**63)
        for batch in islice(batches, min(optimizer.steps, MOST_STEPS)):
            stepping.zero_grad()
            task.losses(forward(model, batch), batch).mean().backward()
            stepping.step()


def _small_batches(data: Batches, model: nn.Module, seed: int) -> list[Batch]:
    """Return the batches of a trial's steps in random order; each is drawn from all over a batch, which may be sorted.

    A batch with a tensor of another length, such as the edges of a graph, has no examples that can be parted.
    """
    small = []
    for batch in islice(read_batches(data, model), MOST_STEPS):
        count = len(batch.targets)
        is_parted = all(tensor.shape[:1] == (count,) for tensor in batch.tensors.values())
        parts = -(-count // _EXAMPLES) if is_parted else 1
        small += [batch.map(itemgetter(slice(first, None, parts))) if parts > 1 else batch for first in range(parts)]
    order = torch.randperm(len(small), generator=torch.Generator().manual_seed(seed % 2**63))
    return [small[index] for index in order.tolist()]


def _losses(scores: list[Score]) -> tuple[float, ...]:
    limit = [_LARGEST_LOSS * score.examples for score in scores]
    return tuple(
        min(most, score.loss)  # a loss that is not a number is not below
        for score, most in zip(scores, limit, strict=True)
    )


def _correct(scores: list[Score]) -> tuple[float, ...]:
    return () if math.isnan(scores[0].correct) else tuple(score.correct for score in scores)
