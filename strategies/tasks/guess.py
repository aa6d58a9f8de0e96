"""The task of a model by one batch of its outputs and targets, where these leave no choice.

integers of the outputs' shape without one axis      classes: the axis is the last one, or the second
the same as the input tokens                         language modelling
zeros and ones of the outputs' shape                 labels
other numbers of the outputs' shape                  regression
"""

from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from fedbasin.strategies.tasks.likelihoods import IGNORED, TaskError
from fedbasin.strategies.tasks.model_task import TASKS, Task
from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read_batches

_VIEWS = ("Alias", "Permute", "Reshape", "Select", "Slice", "Squeeze", "Transpose", "Unsqueeze", "UnsafeView", "View")


def guess_task(model: nn.Module, batches: Batches) -> Task:
    """Return the task of a model by its first batch.

    Args:
        model: the model, which runs in evaluation mode and is left as it was.
        batches: its data, of which one batch is read.

    Raises:
        TaskError: the task is not plain, with what to pass.
        ValueError: there is no data.
    """
    return task_of_batch(*first_outputs(model, batches))


def first_outputs(model: nn.Module, batches: Batches) -> tuple[Tensor, Batch]:
    """Return a model's outputs on its first batch, and that batch; torch's random numbers stay as they were.

    Raises:
        ValueError: there is no data.
    """
    # Gradients tell which operation the outputs come from.
    with evaluating(model), torch.enable_grad(), torch.random.fork_rng([]):
        (batch,) = islice(read_batches(batches, model), 1)
        return forward(model, batch), batch


def task_of_batch(outputs: Tensor, batch: Batch) -> Task:
    """Return the task by a batch of outputs and targets.

    Raises:
        TaskError: the task is not plain, with what to pass.
    """
    targets = batch.targets
    if outputs.ndim and outputs.shape[:1] == targets.shape[:1]:
        name = _of_numbers(outputs, targets) if targets.is_floating_point() else _of_integers(outputs, batch)
        if name in TASKS:
            return TASKS[name]
    else:
        name = "they do not have one row for each example"
    raise TaskError(
        f"the task of outputs {list(outputs.shape)} and targets {targets.dtype} {list(targets.shape)} is not plain: "
        f"{name}; pass basin(task=...) one of {', '.join(map(repr, TASKS))}, or Task.of_loss(loss, draw); "
        "a command takes the name as --task"
    )


def _of_integers(outputs: Tensor, batch: Batch) -> str:
    """Return the name of the task, or why it is open."""
    targets = batch.targets
    if outputs.shape[1:].numel() == targets.shape[1:].numel():
        are_labels = outputs.shape == targets.shape and targets[0].numel() > 1
        if are_labels and set(targets.unique().tolist()) <= {0, 1}:
            return "multi-label"
        return "whole numbers for one output each may be labels or numbers"
    is_last, is_second = (
        outputs.ndim > 1 and outputs.movedim(axis, -1).shape[:-1] == targets.shape and outputs.shape[axis] > 1
        for axis in (-1, 1)
    )
    if outputs.ndim == 2 and is_last:
        return "probabilities look like these; return logits" if _are_probabilities(outputs) else "classification"
    if is_last and is_second:
        return "the classes may be on the last axis or on the second"
    if is_last:
        return "language-modelling" if _are_inputs(batch) else "tokens"
    return "pixels" if is_second else "their shapes fit no likelihood"


def _of_numbers(outputs: Tensor, targets: Tensor) -> str:
    """Return the name of the task, or why it is open."""
    sizes = [[size for size in tensor.shape[1:] if size > 1] for tensor in (outputs, targets)]
    if sizes[0] != sizes[1]:
        return "their shapes differ"
    values = set(targets.unique().tolist())
    if not values <= {0.0, 1.0}:
        sums = targets.sum(-1)
        is_soft = targets.ndim > 1 and targets.shape[-1] > 1 and bool((targets >= 0).all())
        if is_soft and torch.allclose(sums, torch.ones_like(sums)):
            return "the targets of an example sum to 1, as probabilities of classes do"
        return "regression"
    if len(values) < 2:
        return "all targets of the first batch are the same"
    if _is_sigmoid(outputs):
        return "the model ends in a sigmoid, and labels need logits"
    if sizes[0] and bool((targets.sum(-1) == 1).all()):
        return "every example has exactly one label, as with classes"
    return "multi-label"


def _are_probabilities(outputs: Tensor) -> bool:
    sums = outputs.sum(-1)
    return bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def _is_sigmoid(outputs: Tensor) -> bool:
    """Return True if the outputs come from a sigmoid, as far as they know where they come from."""
    node = outputs.grad_fn
    while node is not None and node.name().startswith(_VIEWS):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Sigmoid")


def _are_inputs(batch: Batch) -> bool:
    """Return True if the targets are the input tokens, wherever they count, and no decoder reads others."""
    if isinstance(batch.inputs, Mapping) and "decoder_input_ids" in batch.inputs:
        return False
    tokens = batch.inputs.get("input_ids") if isinstance(batch.inputs, Mapping) else batch.inputs
    if tokens is None or tokens.is_floating_point() or tokens.shape != batch.targets.shape:
        return False
    counted = batch.targets != IGNORED
    if batch.mask is not None:
        counted &= batch.mask
    return bool(counted.any()) and torch.equal(tokens[counted], batch.targets[counted])
