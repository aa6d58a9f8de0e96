"""The sums that determine a model's head: what its last layer multiplies, and the targets of the client's data.

    G = sum of x x^T        M = sum over the examples of each class of x        or    M = sum of (goal - W x) x^T

with `x` the rows behind every operation between the layer and the output (`head_path`), so that a temperature, a mean
over places or a log-softmax is part of what is fitted. Sources: closed-form heads, Fani et al. 2024 (Fed3R), arXiv
2402.01989, and Zhuang et al. 2024 (AFL), arXiv 2405.16240.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.client.refit.head_path import HeadPath, HeadPaths
from fedbasin.client.refit.regression import NormalEquations
from fedbasin.proto.encoding import Encoding
from fedbasin.strategies.capture.layer_calls import ROW_ELEMENTS, LayerCall, LayerCalls, layer_by_layer
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.fusion.update import join, tensor_names
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.statistics.gram_accumulators import zero_accumulator
from fedbasin.strategies.tasks.likelihoods import TaskError
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read_batches
from fedbasin.strategies.tensors.state import State


class HeadRows(NamedTuple):
    """The inputs of a head, and the values that it is fitted to, for every place that counts."""

    inputs: Float[Tensor, "rows in"]
    goals: Float[Tensor, "rows out"]


def head_layer(
    path: HeadPath | None, calls: Sequence[LayerCall], outputs: Tensor, batch: Batch, task: Task
) -> Layer | None:
    """Return the layer of a model that can be fitted to the targets of a task; None where there is none.

    Args:
        path: path that ends at the model's output.
        calls: calls of all layers.
        outputs: the model's output.
        batch: the batch that it was computed from.
        task: the task.
    """
    if path is None or sum(call.layer == path.call.layer for call in calls) > 1:
        return None
    try:
        return path.call.layer if _rows(path, outputs, batch, task) else None
    except TaskError:
        return None


def head_equations(
    model: nn.Module, fused: State, layer: Layer, task: Task, batches: Batches, encoding: Encoding | None = None
) -> NormalEquations:
    """Accumulate the normal equations of a model's head over a client's data.

    Args:
        model: module that holds the fused model.
        fused: the fused model.
        layer: the head.
        task: the task, which gives the values that the head is fitted to.
        batches: the client's data, read once.
        encoding: encoding in which the sums will be sent; a sketch is made while reading.

    Raises:
        ValueError: there is no data, the targets do not fit the outputs, or the layer is not the head of this model.
    """
    device = model.get_parameter(tensor_names(layer.block)[0]).device
    accumulator = zero_accumulator(layer, encoding or Encoding(), device)
    moment = torch.zeros(layer.outputs, layer.inputs, dtype=torch.float64, device=device)
    base = torch.zeros_like(moment) if task.head == Target.labels.name else join(layer.block, fused).to(moment)
    # Gradients show which factors of the output are computed from parameters.
    with evaluating(model), layer_by_layer(), torch.enable_grad():
        for batch in read_batches(batches, model):
            paths = HeadPaths()
            with paths, LayerCalls(model, [layer], paths.follow):
                outputs = forward(model, batch)
            path = paths.path(outputs)
            rows = _rows(path, outputs.detach(), batch, task) if path else None
            if rows is None:
                raise TaskError(
                    f"{layer.block[0]} is not a last layer that the task {task.name!r} can fit; use the same model as "
                    "in the stage before, or a recipe without a closed-form head"
                )
            most = max(1, ROW_ELEMENTS // layer.inputs)
            for inputs, goals in zip(rows.inputs.split(most), rows.goals.split(most), strict=True):
                wide = inputs.double()
                accumulator.add(wide.unsqueeze(0))
                moment.addmm_((goals.double() - wide @ base.mT).mT, wide)
    return NormalEquations(accumulator, moment)


@torch.no_grad()
def _rows(path: HeadPath, outputs: Tensor, batch: Batch, task: Task) -> HeadRows | None:
    """Return the rows of a head; None where its layer does not determine the output, or the task has no head."""
    features = path.features() if task.head else None
    if features is None or (features.is_normalised and task.head != Target.labels.name):
        return None
    shaped = outputs.unsqueeze(features.axis) if features.is_squeezed else outputs
    goals, counted = task.goals(shaped, batch, features.axis)
    rows = features.values.movedim(features.axis, -1).flatten(0, -2)
    return HeadRows(rows[counted], goals[counted])
