"""The layers of a model in the order in which it uses them, and its head."""

from itertools import groupby

import torch
from torch import nn

from fedbasin.client.refit.head_path import HeadPaths
from fedbasin.client.refit.head_sums import head_layer
from fedbasin.proto.layer_graph import LayerGraph
from fedbasin.strategies.capture.layer_calls import LayerCall, LayerCalls, layer_by_layer
from fedbasin.strategies.fusion.batchnorm import find_norms
from fedbasin.strategies.fusion.layers import gram_layers
from fedbasin.strategies.tasks.guess import task_of_batch
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batches, evaluating, forward, read_batches


def read_layer_graph(model: nn.Module, batches: Batches, task: Task | None = None) -> LayerGraph:
    """Return the layers of a model in the order of use on one batch, its head, and its BatchNorm layers.

    Args:
        model: the model, which is left as it was.
        batches: its data, of which one batch is read.
        task: the task, which decides whether a head can be fitted; None takes the one that the batch shows.

    Raises:
        ValueError: there is no data.
    """
    calls: list[LayerCall] = []
    paths = HeadPaths()

    def observe(call: LayerCall) -> None:
        calls.append(call)
        paths.follow(call)

    # Gradients show which factors of the output are computed from parameters.
    with evaluating(model), layer_by_layer(), torch.enable_grad():
        batch = next(read_batches(batches, model))
        with paths, LayerCalls(model, gram_layers(model), observe):
            outputs = forward(model, batch)
    # Reversed, so that a layer that is called twice keeps its first call.
    first_calls = {call.layer.block: call for call in reversed(calls)}
    ordered = sorted(first_calls, key=[call.layer.block for call in calls].index)
    # The calls hold their inputs, so no two tensors have one address.
    levels = groupby(ordered, key=lambda block: id(first_calls[block].inputs))
    task = task or task_of_batch(outputs, batch)
    head = head_layer(paths.path(outputs), calls, outputs.detach(), batch, task)
    values = task.head if head and task.head != "labels" else ""
    return LayerGraph(
        tuple(tuple(level) for _, level in levels), head.block if head else None, find_norms(model), values or ""
    )
