"""The mod: an existing ClientApp takes part in fedbasin without a changed line in its own functions.

    app = ClientApp(mods=[basin(model=Net, data=train_batches)])

On the way in the mod turns a request into the message that Flower's FedAvg would send: the anchor (or the app's own
initial weights, for an independent initialisation) as an ordinary ArrayRecord, and the app's own config. On the way
out it aligns the model that the app has trained, collects statistics on it and sends both.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from fedbasin.client.app_task import AppTask
from fedbasin.client.client_state import (
    forget,
    keep_fused,
    keep_optimizer,
    keep_sent,
    keep_start,
    keep_trained,
    sent_reply,
    trained_reply,
)
from fedbasin.client.data_check import check_data, needs_data
from fedbasin.client.factories import Factory, data_factory, held_out_share, model_factory
from fedbasin.client.lora_names import model_names
from fedbasin.client.measure import measure_fused
from fedbasin.client.refit.local_steps import seeing_optimizer
from fedbasin.client.refit.refit_reply import refit_reply
from fedbasin.client.reply_builder import build_reply, read_weight, with_layers
from fedbasin.client.request_reader import Data, read_request
from fedbasin.proto import plain
from fedbasin.proto.header import HEADER, MOVING, has_header, records, without_header
from fedbasin.proto.reply import Reply
from fedbasin.proto.request import CHECK, Request, Start
from fedbasin.strategies.alignment.matchers import AUTO, Matcher
from fedbasin.strategies.fusion.lora.adapter_scales import read_scales, scales_of, set_scales, to_scales
from fedbasin.strategies.judging.outcomes import Refusal
from fedbasin.strategies.tasks.model_task import Task, task_of
from fedbasin.strategies.tensors.batches import Batches
from fedbasin.strategies.tensors.state import State

Next: TypeAlias = Callable[[Message, Context], Message]
Mod: TypeAlias = Callable[[Message, Context, Next], Message]


class AppReplyError(ValueError):
    """A reply of the app from which the mod cannot build its own."""


def basin(
    model: Factory[nn.Module],
    data: Factory[Batches] | Batches | None = None,
    held_out: Factory[Batches] | Batches | float = 0.1,
    task: Task | str | None = None,
) -> Mod:
    """Return the mod that makes an app a client of fedbasin.

    Each argument that is a function may have no parameters, or take Flower's context. Messages of other servers pass
    through untouched.

    Args:
        model: the model's class, or a function that makes the model. Its initial weights are the client's own
            independent initialisation.
        data: the client's training batches, or a function that makes them for every pass: `(inputs, targets)`, with a
            padding mask as third, or dictionaries as in Flower's quickstart. Required for Fisher information, Gram
            matrices, refits and barriers.
        held_out: batches that the client does not train on, by which the recipe `auto` compares models; or a share of
            `data` that no layer is fitted to, at most 1000 examples of it. 0 compares by all training data, on which a
            model that has memorised it looks better than it is.
        task: what outputs and targets mean: `classification`, `tokens`, `pixels`, `language-modelling`, `multi-label`,
            `regression`, or `Task.of_loss(loss, draw)`. None takes what the first batch shows, and refuses before
            training what it leaves open.

    Raises:
        TypeError: an argument is in none of these forms.
        ValueError: there is no task of this name.
    """
    make_model = model_factory(model)
    make_data = None if data is None else data_factory(data)
    app_task = AppTask(None if task is None else task_of(task))
    share = held_out_share(held_out)
    make_held_out = None if share is not None else data_factory(held_out, "held_out")  # type: ignore[arg-type]

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        if not has_header(message.content):
            return call_next(message, context)
        request = read_request(message.content, context.node_id)
        batches = make_data and partial(make_data, context)
        request, task, lacking = _prepared(request, app_task, make_model, context, batches)
        if request.refit is not None:
            keep_fused(context, request, message.content)
            probed = partial(make_held_out, context) if make_held_out else share or 0.0
            try:
                reply = refit_reply(request, request.refit, context, make_model(context), batches, probed, task)
            except Refusal as refusal:
                reply = _refused(request, refusal)
            # Measured running statistics are only part of a model, which the app's array names do not cover.
            return Message(content=reply.to_content(request, packed=True), reply_to=message)
        if request.stage == CHECK:
            reply = Reply(request.round, request.stage, request.anchor_digest, detail=lacking)
            if request.optional:
                with torch.random.fork_rng([]):
                    reply = with_layers(reply, request, make_model(context), batches, task)
            return Message(content=reply.to_content(request), reply_to=message)
        if message.metadata.message_type.startswith("evaluate"):
            return _evaluate(request, message, context, call_next, make_model, batches, task)
        judges = make_held_out is not None
        return _train(request, message, context, call_next, make_model(context), batches, task, lacking, judges=judges)

    return mod


def _prepared(
    request: Request, app_task: AppTask, make_model: Callable[[Context], nn.Module], context: Context, data: Data | None
) -> tuple[Request, Task | None, str]:
    """Return a request as far as the client can answer it, its task, and why it cannot report optional layers."""
    try:
        # What the app draws must not depend on what the mod looks at.
        with torch.random.fork_rng([]):
            task = app_task.resolve(request, make_model, context, data)
            if needs_data(request) and request.round <= 1 and not request.moving and request.refit is None:
                check_data(partial(make_model, context), data, request.anchor)
    except Exception as error:
        if not (request.optional and request.layer_graph):
            raise
        # What cannot be read aligns nothing either, where the matcher is left to the client.
        matcher = Matcher.weights.name if request.matcher == AUTO else request.matcher
        rest = replace(request, layer_graph=False, matcher=matcher)
        return (*_prepared(rest, app_task, make_model, context, data)[:2], f"{type(error).__name__}: {error}")
    return request, task, ""


def _train(
    request: Request,
    message: Message,
    context: Context,
    call_next: Next,
    model: nn.Module,
    data: Data | None,
    task: Task | None,
    lacking: str,
    *,
    judges: bool,
) -> Message:
    # Held here because `_train_once` replaces the content of the message by the app's.
    content, started = message.content, time.perf_counter()
    app = _train_once(request, message, context, call_next, model)
    # From here on the model runs factors of the anchor's scale.
    set_scales(model, scales_of(request.anchor))
    if isinstance(app, Message):
        return app
    seconds, metrics = time.perf_counter() - started, {**app.metrics, request.weight_key: app.examples}
    try:
        reply = build_reply(request, app.parameters or {}, metrics, model, data, task, train_seconds=seconds)
        reply = replace(reply, detail=reply.detail or lacking, judges=judges)
    except Refusal as refusal:
        return Message(content=_refused(request, refusal).to_content(request), reply_to=message)
    reply_content = reply.to_content(request, packed=request.packed)
    # A merged model belongs to several clients: it must not replace the model that this client has sent.
    if request.keep and reply.parameters is not None and not request.moving:
        keep_sent(context, request, reply_content)
        keep_start(context, request, content)
    return Message(content=reply_content, reply_to=message)


def _train_once(
    request: Request, message: Message, context: Context, call_next: Next, model: nn.Module
) -> Reply | Message:
    """Return the model that was trained in this round, now or in an earlier stage, or the app's error."""
    if request.moving:
        merged = {**request.anchor, **request.moving}
        return Reply(request.round, request.stage, parameters=merged, examples=request.moving_examples)
    earlier = trained_reply(context, request)
    if earlier is None or not request.keep:
        forget(context)
    if earlier is not None:
        return earlier
    scales = read_scales(model, scales_of(request.anchor))
    start = _initial_state(request, model) | scales if request.start is Start.own else None
    if scales and start is None:
        start = to_scales(request.anchor, scales, _trained_factor(request))
    message.content = _app_content(request, message.content, start)
    with seeing_optimizer() if request.layer_graph else nullcontext() as optimizer:
        reply = call_next(message, context)
    if reply.has_error():
        return reply
    app = _read_app_reply(request, reply.content, scales)
    if optimizer is not None:
        keep_optimizer(context, optimizer)
    if request.keep:
        keep_trained(context, request, app)
    return app


def _evaluate(
    request: Request,
    message: Message,
    context: Context,
    call_next: Next,
    make_model: Callable[[Context], nn.Module],
    data: Data | None,
    task: Task | None,
) -> Message:
    """Let the app evaluate; add the path from the fused model to the one that the client sent, if that was kept."""
    scales = scales_of(request.anchor)
    model = make_model(context) if scales else None
    start = None if model is None else to_scales(request.anchor, read_scales(model, scales))
    message.content = _app_content(request, message.content, start)
    reply = call_next(message, context)
    if request.path_points and not reply.has_error():
        sent = sent_reply(context, request)
        if sent is not None and sent.parameters is not None:
            model = model or make_model(context)
            set_scales(model, scales)
            fused = measure_fused(request, sent.parameters, model, data, task)
            reply.content[HEADER] = fused.to_content(request)[HEADER]
    if not request.keep:
        forget(context)
    return reply


def _trained_factor(request: Request) -> Literal["down", "up"]:
    return "down" if request.frozen_factor == "lora_B" else "up"


def _initial_state(request: Request, model: nn.Module) -> dict[str, Tensor]:
    """Return the model's own weights; where adapters travel alone, its own adapters under the anchor's names."""
    state = model.state_dict()
    names = model_names(model, request.anchor)
    return state if names.keys() == state.keys() else {n: state[m] for n, m in names.items()}


def _app_content(request: Request, content: RecordDict, start: State | None = None) -> RecordDict:
    """Return the content that FedAvg would send to the app.

    Args:
        request: the request.
        content: the content in which it came.
        start: the state that the app starts from, in place of the anchor.
    """
    # Plain arrays are passed on as they came, without a copy.
    arrays = content[request.arrays_key]
    if start is not None or request.packed:
        arrays = plain.write_arrays(request.for_app(request.anchor if start is None else start))
    app_records = {
        name: without_header(record) if isinstance(record, ConfigRecord) else record
        for name, record in content.items()
        if name not in (request.arrays_key, MOVING)
    }
    return RecordDict({request.arrays_key: arrays, **app_records})


def _read_app_reply(request: Request, content: RecordDict, scales: State) -> Reply:
    """Read the app's own reply to a request for training, with adapters in the anchor's scales.

    Args:
        request: the request.
        content: the content of the app's reply.
        scales: the client's own scales of adapters, which the app need not send.

    Raises:
        AppReplyError: the reply does not hold one model and one record of metrics.
        WeightError: the metrics lack the client's weight.
    """
    arrays, metrics = records(content, ArrayRecord), records(content, MetricRecord)
    if len(arrays) != 1 or len(metrics) != 1:
        raise AppReplyError(
            f"the app replied with {len(arrays)} ArrayRecords and {len(metrics)} MetricRecords (its records are "
            f"{', '.join(content) or 'none'}); reply with one of each: the model's state dict, and metrics with "
            f"{request.weight_key!r}"
        )
    reply = Reply.from_message(content, request)
    parameters = to_scales({**scales, **(reply.parameters or {})}, scales_of(request.anchor), _trained_factor(request))
    (record,) = metrics.values()
    return replace(reply, parameters=parameters, examples=read_weight(request, record))


def _refused(request: Request, refusal: Refusal) -> Reply:
    """Return the reply of a client whose model the server would refuse: the outcome in place of the model."""
    outcome = refusal.outcome.name
    return Reply(request.round, request.stage, request.anchor_digest, outcome=outcome, detail=refusal.detail)
