"""The mod: an existing ClientApp takes part in fedbasin without a changed line in its own functions.

    app = ClientApp(mods=[basin(model=lambda context: Net(), data=lambda context: loader(context))])

On the way in the packed anchor becomes the ordinary ArrayRecord that the app expects (its own initial
weights, where clients never shared a start); on the way out the app's trained model is aligned, statistics
are collected on it, and the reply is packed.
"""

import time
from collections.abc import Callable
from typing import TypeAlias

from flwr.app import Context, Message, RecordDict
from torch import Tensor, nn

from fedbasin.client.client_state import forget, keep, keep_begun, keep_fused, keep_sent, kept, sent
from fedbasin.client.data import Batches
from fedbasin.client.lora_names import model_names
from fedbasin.client.measure.measure import fused_path
from fedbasin.client.refit.refit_reply import fit_reply
from fedbasin.client.reply import build_reply
from fedbasin.client.request import Data, Request, read_request
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import plain, wire

Next: TypeAlias = Callable[[Message, Context], Message]
Mod: TypeAlias = Callable[[Message, Context, Next], Message]


class AppReplyError(ValueError):
    """The app's own reply is not what the mod can build on."""


def basin(
    model: Callable[[Context], nn.Module],
    data: Callable[[Context], Batches] | None = None,
    held_out: Callable[[Context], Batches] | None = None,
) -> Mod:
    """The client's share of fedbasin, as a Flower mod.

    Messages of other servers pass through untouched.

    Args:
        model: makes the app's model; its initial weights are the client's own start.
        data: makes the client's training batches, `(inputs, targets)` or with a padding mask; called once
            for every pass. Needed for Fisher, RegMean, fits and barriers.
        held_out: makes batches that the client does not train on, as a tenth of its examples; the recipe `auto`
            then chooses by those. None: by the training data, which forgive what is learned by heart.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        if not wire.has_header(message.content):
            return call_next(message, context)
        request = read_request(message.content, context.node_id)
        batches = None if data is None else lambda: data(context)
        asked = message.content
        if request.header.HasField("fit"):
            keep_fused(context, asked)
            probed = batches if held_out is None else lambda: held_out(context)
            content = fit_reply(request, context, model(context), batches, probed)
            return Message(content=content, reply_to=message)
        if message.metadata.message_type.startswith("evaluate"):
            message.content = _for_app(message.content, request.anchor)
            reply = call_next(message, context)
            if request.header.path_points and not reply.has_error():
                _probe_fused(request, reply, context, model, batches)
            if not request.header.keep:
                forget(context)
            return reply
        own = model(context)
        started = time.perf_counter()
        trained = _train(request, message, context, call_next, own)
        if isinstance(trained, Message):
            return trained
        seconds = time.perf_counter() - started
        content = build_reply(request, *trained, own, batches, train_seconds=seconds)
        if request.header.keep and wire.ARRAYS in content and not request.moving:
            keep_sent(context, content)
            if request.header.order:
                keep_begun(context, asked)
        return Message(content=content, reply_to=message)

    return mod


def _train(
    request: Request, message: Message, context: Context, call_next: Next, own: nn.Module
) -> tuple[dict[str, Tensor], dict[str, float]] | Message:
    """The model that this round has trained, now or in an earlier stage; or the app's error reply."""
    header = request.header
    if request.moving:
        return {**request.anchor, **request.moving}, {"num-examples": header.moving_examples}
    before = kept(context, header.round)
    if not (before and header.keep):
        forget(context)
    if before:
        return before
    is_own = header.start == pb.START_OWN
    start = _own_start(request, own) if is_own else request.anchor
    message.content = _for_app(message.content, start)
    out = call_next(message, context)
    if out.has_error():
        return out
    state, metrics = _from_app(out.content)
    if header.keep:
        keep(context, header.round, state, metrics)
    return state, metrics


def _own_start(request: Request, own: nn.Module) -> dict[str, Tensor]:
    """The model's own weights; where adapters travel alone, its own adapters."""
    state = dict(own.state_dict())
    names = model_names(own, request.anchor)
    return state if names.keys() == state.keys() else {n: state[m] for n, m in names.items()}


def _probe_fused(
    request: Request,
    reply: Message,
    context: Context,
    model: Callable[[Context], nn.Module],
    data: Data | None,
) -> None:
    """Add the path from the fused model to the one that this client sent, if it still has that."""
    own = sent(context, request.header.round)
    if own is not None and request.path_points:
        wire.write(reply.content, fused_path(request, own, model(context), data))


def _for_app(content: RecordDict, state: dict[str, Tensor]) -> RecordDict:
    """The message as the app knows it: an ordinary ArrayRecord, and the app's own config."""
    known = {name: record for name, record in content.items() if name != wire.HEADER}
    known.pop(wire.RADII, None)
    return RecordDict({**known, wire.ARRAYS: plain.write(state)})


def _from_app(content: RecordDict) -> tuple[dict[str, Tensor], dict[str, float]]:
    if len(content.array_records) != 1 or len(content.metric_records) != 1:
        raise AppReplyError(
            f"the app replied with {len(content.array_records)} ArrayRecords and "
            f"{len(content.metric_records)} MetricRecords; reply with one of each: the model's state dict, "
            "and metrics with 'num-examples'"
        )
    (arrays,) = content.array_records.values()
    (record,) = content.metric_records.values()
    return plain.read(arrays), wire.numbers(record)
