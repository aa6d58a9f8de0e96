"""Evaluation of a model on some data with the tensors of a state in place of its own.

    L = sum over examples of the loss of the task        p(y | x) of every example

The model gives the architecture: it runs in evaluation mode and is left as it was.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedbasin.strategies.tasks.guess import task_of_batch
from fedbasin.strategies.tasks.model_task import Task, task_of
from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read_batches
from fedbasin.strategies.tensors.state import State


class Score(NamedTuple):
    """Sums over examples: loss, number of correct ones (NaN where the task has none), number of examples."""

    loss: float
    correct: float
    examples: float


def evaluate(model: nn.Module, state: State, batches: Batches, task: Task | str | None = None) -> Score:
    """Evaluate the model on some data with the tensors of `state` in place of its own.

    The model runs in evaluation mode and is left as it was. In sequence labelling every token is an example if the mask
    keeps it and its target is not -100.

    Args:
        model: gives the architecture.
        state: tensors of the model.
        batches: the data, read once.
        task: the task or its name; None takes the one that the first batch shows.

    Raises:
        ValueError: there is no data, the state does not fit the model, the targets do not fit the outputs, or the task
            is not plain.
    """
    sums = [kind.score(outputs, batch) for kind, outputs, batch in _outputs(model, state, batches, task)]
    # Added on the device and transferred once: reading every batch's loss would wait for the device each time.
    return Score(*torch.stack(sums).sum(0).tolist())


def predict(
    model: nn.Module, state: State, batches: Batches, task: Task | str | None = None
) -> tuple[Float[Tensor, "rows classes"], Int[Tensor, " rows"]] | None:
    """Return the probabilities of the classes and the targets, a row for every place that `evaluate` counts.

    A label is a row of two classes. A task without classes and labels has no probabilities: None.

    Raises:
        ValueError: there is no data, the state does not fit the model, the targets do not fit the outputs, or the task
            is not plain.
    """
    parts = [kind.probabilities(outputs, batch) for kind, outputs, batch in _outputs(model, state, batches, task)]
    rows = [part for part in parts if part is not None]
    if not rows:
        return None
    probabilities, targets = zip(*rows, strict=True)
    return torch.cat(probabilities), torch.cat(targets)


@torch.no_grad()
def _outputs(
    model: nn.Module, state: State, batches: Batches, task: Task | str | None
) -> Iterator[tuple[Task, Tensor, Batch]]:
    """Yield the task, the outputs and the batch for each batch."""
    bound, kind = bind(model, state), None if task is None else task_of(task)
    with evaluating(model):
        for batch in read_batches(batches, model):
            outputs = forward(model, batch, bound)
            kind = kind or task_of_batch(outputs, batch)
            yield kind, outputs, batch


def bind(model: nn.Module, state: State) -> dict[str, Tensor]:
    """Check a state against a model, and return each tied tensor once, under the model's first name for it.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    tensors = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    if unknown := sorted(state.keys() - tensors.keys()):
        raise ValueError(f"the model has no tensor {unknown[0]!r}; pass a state of this model")
    first_names: dict[int, str] = {}
    bound: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # `functional_call` refuses two values for one tied tensor.
        target = first_names.setdefault(id(tensor), name)
        if name not in state:
            continue
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"tensor {name!r} is {list(tensor.shape)} in the model and {list(state[name].shape)} in the state; "
                "pass a state of this model"
            )
        # A state that came in a message is on the CPU, wherever the model is.
        bound[target] = state[name].to(tensor.device)
    if missing := sorted(set(first_names.values()) - bound.keys()):
        raise ValueError(f"the state has no tensor {missing[0]!r}; pass all tensors of the model")
    return bound
