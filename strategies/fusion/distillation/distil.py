"""Distillation of several models into one, on inputs without labels.

    min over theta of  sum over places of  D( p(y | mean_k f_k(x)) || p(y | f_theta(x)) )

Source: Lin et al. 2020 (FedDF), arXiv 2006.07242, which takes the mean of logits. D is the Kullback-Leibler divergence
of classes or labels, and the squared error of numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, logsigmoid, mse_loss

from fedbasin.strategies.tasks.likelihoods import Bernoulli, Categorical, Gaussian, TaskError, widen
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batch, evaluating, forward
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True, eq=False)
class Distillation:
    """A distilled model.

    Attributes:
        state: tensors of the model, those of the pass with the lowest divergence.
        before: mean divergence of the student from the ensemble, for each place.
        after: that of the distilled model; never above `before`.
    """

    state: dict[str, Tensor]
    before: float
    after: float


def distil(
    module: nn.Module,
    student: State,
    teachers: Iterable[State],
    batches: Sequence[Batch],
    task: Task,
    passes: int,
    rate: float,
    held_out: Sequence[Batch] = (),
) -> Distillation:
    """Train a model to give the outputs that the ensemble of others gives.

    All run in evaluation mode, so running statistics stay as they are. Adam takes one step for each batch. A student that
    gives the ensemble's outputs already stays as it is, bit by bit.

    Args:
        module: runs the models; its tensors are replaced.
        student: state to begin with.
        teachers: states of the ensemble, read once, one after the other.
        batches: the inputs; their targets are not read.
        task: the task, which says what outputs mean.
        passes: number of passes over the batches.
        rate: learning rate of Adam.
        held_out: inputs by which the best pass is chosen; empty for the batches themselves.

    Raises:
        TaskError: the task has no divergence between outputs.
        ValueError: the divergence is not finite.
    """
    with evaluating(module):
        goals = _mean_outputs(module, teachers, [*batches, *held_out])
        judged = list(zip(held_out or batches, goals[-len(held_out) :], strict=True))
        module.load_state_dict(student, strict=False)
        before = after = _divergence_of(module, judged, task)
        best = _copy(module)
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=rate)
        for _ in range(passes):
            _train(module, batches, goals, task, optimizer)
            value = _divergence_of(module, judged, task)
            if value < after:
                after, best = value, _copy(module)
    return Distillation(best, before, after)


def divergence(task: Task, teacher: Tensor, student: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over places of the divergence of a student's outputs from a teacher's.

    Args:
        task: the task.
        teacher: outputs of the teacher.
        student: outputs of the student.
        mask: places of a sequence that count, `[batch, tokens]`.

    Raises:
        TaskError: the task has no divergence.
    """
    p, q = (widen(task.likelihood.arrange(outputs)) for outputs in (teacher, student))
    match task.likelihood:
        case Categorical():
            values = kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        case Bernoulli():
            sides = [
                kl_div(logsigmoid(sign * q), logsigmoid(sign * p), log_target=True, reduction="none")
                for sign in (-1, 1)
            ]
            values = sides[0] + sides[1]
        case Gaussian():
            values = mse_loss(q, p, reduction="none")
        case _:
            raise TaskError(f"the task {task.name!r} has no divergence between outputs; choose another one")
    if mask is not None and values.shape[:2] == mask.shape:
        values = values[mask]
    return values.mean()


@torch.no_grad()
def _mean_outputs(module: nn.Module, teachers: Iterable[State], batches: Sequence[Batch]) -> list[Tensor]:
    sums: list[Tensor] = []
    count = 0
    for teacher in teachers:
        count += 1
        module.load_state_dict(teacher, strict=False)
        outputs = [widen(forward(module, batch)) for batch in batches]
        sums = [total + part for total, part in zip(sums, outputs, strict=True)] if sums else outputs
    return [total / count for total in sums]


@torch.no_grad()
def _divergence_of(module: nn.Module, judged: Sequence[tuple[Batch, Tensor]], task: Task) -> float:
    values = [divergence(task, goal, forward(module, batch), batch.mask) for batch, goal in judged]
    mean = float(torch.stack(values).double().mean())
    if mean != mean or mean == float("inf"):
        raise ValueError(f"the divergence from the ensemble is {mean}; choose a smaller rate")
    # Rounding takes a divergence of equal outputs below zero.
    return max(0.0, mean)


def _train(
    module: nn.Module, batches: Sequence[Batch], goals: Sequence[Tensor], task: Task, optimizer: torch.optim.Optimizer
) -> None:
    for batch, goal in zip(batches, goals, strict=False):
        optimizer.zero_grad()
        divergence(task, goal, forward(module, batch), batch.mask).backward()
        optimizer.step()


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
