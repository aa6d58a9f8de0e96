"""Reading of a reply: a message becomes a `Reply` and an `Update`, or is refused by name."""

import hashlib
from dataclasses import dataclass

from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from fedbasin.proto.header import HeaderSizeError, SchemaVersionError, WireError, records
from fedbasin.proto.packing import PackingError
from fedbasin.proto.reply import Reply
from fedbasin.proto.request import Request, Start
from fedbasin.server.exchange.message_limits import check_limits, shortened
from fedbasin.server.exchange.reply_pulls import TOO_LARGE
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.round.decode_statistics import DecodedStatistics, decode_statistics

# Flower's codes of an app that does not load, that raised, whose mod refused, that is invalid, that crashed; the
# others are the SuperLink's.
_CLIENT_ERRORS = {1, 2, 6, 7, 8}

# What the mod finds by the server's rules for the model and the statistics of its own client. Every other outcome is
# for the server to find: a client that named it could evade its strikes, or hide a refusal among those of lost nodes.
_OWN_OUTCOMES = {
    outcome.name
    for outcome in (
        Outcome.missing_tensor,
        Outcome.unexpected_tensor,
        Outcome.wrong_shape,
        Outcome.wrong_dtype,
        Outcome.non_finite,
        Outcome.out_of_line,
        Outcome.not_positive,
    )
}

_MOD = "from fedbasin import basin; app = ClientApp(mods=[basin(model=Net, data=train_batches)])"


@dataclass(frozen=True, eq=False)
class Received:
    """One client's reply, decoded; its numbers are not yet checked against the anchor.

    Attributes:
        reply: the reply as it was sent.
        update: what it adds to a sum.
    """

    reply: Reply
    update: Update


def receive(message: Message, request: Request, max_bytes: int) -> Received:
    """Decode one reply; its tensors are views of the message's bytes.

    Args:
        message: the reply.
        request: the request that it answers.
        max_bytes: largest size of the arrays.

    Raises:
        Refusal: the reply is an error, does not parse, answers another request, is too large, or comes from an app
            without the mod where the request needs it.
    """
    if message.has_error():
        raise _client_error(message)
    check_limits(message.content, max_bytes)
    try:
        reply = Reply.from_message(message.content, request)
    except HeaderSizeError as error:
        raise Refusal(Outcome.too_large, str(error)) from error
    except SchemaVersionError as error:
        raise Refusal(Outcome.schema_version, str(error)) from error
    except (WireError, PackingError) as error:
        raise Refusal(Outcome.malformed, str(error)) from error
    if reply.has_mod:
        _check_answers(reply, request)
    else:
        _check_needs_no_mod(reply, request)
    _check_weight(message.content, request.weight_key)
    return Received(reply, _update(reply, request))


def _client_error(message: Message) -> Refusal:
    code, reason = message.error.code, shortened(message.error.reason or "no reason given")
    if TOO_LARGE in reason:
        return Refusal(Outcome.too_large, reason)
    if "No evaluate function registered" in reason:
        return Refusal(Outcome.no_evaluate, f"error {code}: {reason}")
    if "fitins.parameters" in reason or "evaluateins.parameters" in reason:
        return Refusal(
            Outcome.client_error,
            "the client is a legacy Client (client_fn), which does not read messages of strategies; write it with "
            "@app.train() and @app.evaluate()",
        )
    outcome = Outcome.client_error if code in _CLIENT_ERRORS else Outcome.unavailable
    return Refusal(outcome, f"error {code}: {reason}")


def _check_answers(reply: Reply, request: Request) -> None:
    """Check that a reply of the mod answers this request, in the frame that was requested."""
    if (reply.round, reply.stage) != (request.round, request.stage):
        raise Refusal(
            Outcome.wrong_round,
            f"round {reply.round}, {reply.stage or 'no stage'}; this is round {request.round}, {request.stage}",
        )
    if reply.anchor_digest != request.anchor_digest:
        digest = reply.anchor_digest.hex()[:12] or "missing"
        raise Refusal(Outcome.wrong_anchor, f"digest {digest}")
    if reply.lost:
        raise Refusal(Outcome.lost_model, f"round {reply.round}, {reply.stage}")
    if reply.outcome:
        raise _own_refusal(reply)
    if request.kind == "evaluate":
        return
    symmetry = hashlib.sha256(request.symmetry.encode()).digest() if request.aligns else b""
    if reply.symmetry_digest != symmetry:
        raise Refusal(Outcome.symmetry_mismatch, f"digest {reply.symmetry_digest.hex()[:12]!r}")
    if reply.function_changed:
        error = reply.alignment.endpoint_error if reply.alignment else None
        raise Refusal(Outcome.function_changed, f"its own loss changed by {error or 0.0:.2g} of itself")


def _own_refusal(reply: Reply) -> Refusal:
    """Return the refusal that a client has found for its own model by the same rules."""
    if reply.outcome not in _OWN_OUTCOMES:
        return Refusal(
            Outcome.malformed, f"the client names the outcome {reply.outcome[:40]!r}, which no client finds for itself"
        )
    return Refusal(Outcome[reply.outcome], reply.detail)


def _check_weight(content: RecordDict, key: str) -> None:
    """Check that a reply has a number as its client's weight; its size is checked with the update."""
    metrics = {name: v for record in records(content, MetricRecord).values() for name, v in record.items()}
    if not isinstance(metrics.get(key), int | float):
        rest = f" and {len(metrics) - 3} more" if len(metrics) > 3 else ""
        names = f"{', '.join(list(metrics)[:3]) or 'none'}{rest}"
        raise Refusal(Outcome.bad_weight, f"the reply's metrics ({names}) have no number {key!r}")


def _check_needs_no_mod(reply: Reply, request: Request) -> None:
    """Check that an app without the mod could answer the request."""
    needs = None
    if request.statistic != "none":
        needs = f"statistics ({request.statistic})"
    elif request.refit is not None:
        needs = "a fit of layers"
    elif request.layer_graph and not request.optional:
        needs = "a fit of layers after the fusion"
    elif request.start is Start.own:
        needs = "training from the client's own initial weights"
    elif request.moving or request.merged_examples:
        needs = "alignment to another client's model"
    if needs is not None:
        raise Refusal(Outcome.missing_mod, f"the recipe needs {needs}; add to the client: {_MOD}")
    if request.kind == "train" and reply.parameters is None:
        raise Refusal(Outcome.missing_tensor, "the reply does not have one record of arrays; reply with one")


def _update(reply: Reply, request: Request) -> Update:
    if request.kind == "evaluate":
        return Update({}, reply.examples, layer_graph=reply.layer_graph)
    kind = "gram" if request.refit is not None else request.statistic
    decoded = DecodedStatistics()
    if reply.statistics:
        decoded = decode_statistics(reply.statistics, kind, request.encodings)
    parameters: dict[str, Tensor] = dict(reply.parameters or {})
    if request.refit is None and not parameters:
        lacks = f"has no record {request.arrays_key!r}" if reply.parameters is None else "has a record without arrays"
        raise Refusal(Outcome.missing_tensor, f"the reply {lacks}")
    return Update(
        parameters,
        reply.examples,
        decoded.precisions,
        decoded.moments if request.refit is not None else {},
        reply.layer_graph,
    )
