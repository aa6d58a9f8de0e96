"""Assembly of a client's reply: align the trained model, measure it, collect statistics on it."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from fedbasin.client.align import align
from fedbasin.client.collect import collect
from fedbasin.client.measure import measure
from fedbasin.client.refit.used_layers import read_layer_graph
from fedbasin.client.request_reader import Data, required
from fedbasin.proto.reply import Metrics, Reply
from fedbasin.proto.request import Request
from fedbasin.strategies.fusion.lora.lora_factors import widen
from fedbasin.strategies.judging.checks import check_model
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.state import State


class WeightError(ValueError):
    """Metrics without the weight of the client's update."""


def build_reply(
    request: Request,
    trained: State,
    metrics: Metrics,
    model: nn.Module,
    data: Data | None = None,
    task: Task | None = None,
    *,
    train_seconds: float = 0.0,
) -> Reply:
    """Build the reply to a request for a trained model.

    A model whose function alignment has changed is not sent: the reply says so, and holds neither tensors nor
    statistics.

    Args:
        request: the request.
        trained: the client's own model.
        metrics: metrics of the app, with the client's weight under `request.weight_key`.
        model: module that runs the states; its tensors are replaced.
        data: gives the client's own batches, anew at every call.
        task: the task; None takes the one that the first batch shows.
        train_seconds: duration of the training, for the round's report.

    Raises:
        MissingDataError: the request needs data and there is none.
        Refusal: the server would refuse the model or its statistics.
        WeightError: the metrics lack the client's weight, or it is not a number.
    """
    examples = read_weight(request, metrics)
    # A space of low-rank adapters is as wide as the anchor's rank.
    wide = widen(trained, request.anchor)
    # By the server's rules and before it is aligned: matching NaN, or other shapes, fails without a name.
    check_model(wide, request.anchor)
    trained = wide if request.aligns else trained
    aligned = align(request, trained, examples, model, data, task)
    measurement = measure(request, trained, aligned, model, data, task)
    alignment = aligned.report and replace(
        aligned.report, endpoint_error=measurement.endpoint_error, singular_vectors=measurement.singular_vectors
    )
    reply = Reply(
        request.round,
        request.stage,
        request.anchor_digest,
        aligned.symmetry_digest,
        alignment=alignment,
        path=measurement.path,
        train_seconds=train_seconds,
        function_changed=measurement.function_changed,
        probe_seconds=measurement.seconds,
        metrics={name: value for name, value in metrics.items() if name != request.weight_key},
        examples=examples,
    )
    if not reply.function_changed:
        statistics = collect(request, aligned.state, examples, model, data, task)
        # A client may train adapters of a lower rank; the rows of zeros that widen them change no product.
        state = widen(aligned.state, request.anchor)
        reply = replace(reply, parameters={name: state[name] for name in request.anchor}, statistics=statistics)
    # The graph does not depend on the weights, so it is sent even where the model is not.
    return with_layers(reply, request, model, data, task)


def with_layers(reply: Reply, request: Request, model: nn.Module, data: Data | None, task: Task | None = None) -> Reply:
    """Return a reply with the layers of the model, where they are requested, or with why it lacks optional ones.

    Args:
        reply: the reply.
        request: the request.
        model: the model, which is left as it was.
        data: gives the client's own batches, anew at every call.
        task: the task; None takes the one that the first batch shows.
    """
    if not request.layer_graph:
        return reply
    try:
        # What the app draws must not depend on this look at its data.
        with torch.random.fork_rng([]):
            return replace(reply, layer_graph=read_layer_graph(model, required(data, "the layer graph")(), task))
    except Exception as error:
        if not request.optional:
            raise
        return replace(reply, detail=f"{type(error).__name__}: {error}")


def read_weight(request: Request, metrics: Mapping[str, object]) -> float:
    """Return the weight of a client's update.

    Raises:
        WeightError: the metrics lack it, or it is not a number.
    """
    weight = metrics.get(request.weight_key)
    if not isinstance(weight, int | float):
        raise WeightError(
            f"the reply's metrics ({', '.join(metrics) or 'none'}) have no number {request.weight_key!r}, the weight "
            "of this client's update; add it to the app's MetricRecord, as the number of training examples"
        )
    return weight
