"""A client's memory between the stages of a round, in its Flower context.

Models are kept in the records in which they were sent or came, so keeping a model copies nothing. The memory is that
of the SuperNode's process: a SuperNode that restarted in between has lost it, and its client then trains again, or
replies that it has lost its model.
"""

from flwr.app import ConfigRecord, Context, RecordDict

from fedbasin.client.refit.local_steps import LocalOptimizer
from fedbasin.proto.reply import Reply
from fedbasin.proto.request import Request
from fedbasin.strategies.tensors.state import State

_PREFIX = "fedbasin."
_TRAINED = f"{_PREFIX}trained"
_SENT = f"{_PREFIX}sent"
_START = f"{_PREFIX}start"
_OPTIMIZER = f"{_PREFIX}optimizer"
_PIECE = f"{_PREFIX}fused-"


def keep_trained(context: Context, request: Request, reply: Reply) -> None:
    """Keep a model as trained, with its metrics, in place of any earlier one."""
    # Packed even where the request is plain: few arrays cost less, and bfloat16 has no plain form.
    _put(context, _TRAINED, reply.to_content(request, packed=True), request.arrays_key, "metrics")


def trained_reply(context: Context, request: Request) -> Reply | None:
    """Return the model trained in the request's round and its metrics, or None where it was not kept."""
    return _reply(context, _TRAINED, request)


def keep_optimizer(context: Context, optimizer: LocalOptimizer) -> None:
    """Keep what is known of the optimizer of the app's own training."""
    context.state[_OPTIMIZER] = ConfigRecord({"optimizer": optimizer.to_json()})


def local_optimizer(context: Context) -> LocalOptimizer:
    """Return what is known of the optimizer of the app's own training in this round."""
    record = context.state.get(_OPTIMIZER)
    return LocalOptimizer.from_json(str(record["optimizer"])) if isinstance(record, ConfigRecord) else LocalOptimizer()


def keep_sent(context: Context, request: Request, content: RecordDict) -> None:
    """Keep the model in the content of a reply, in place of any earlier one."""
    _put(context, _SENT, content, request.arrays_key, "metrics")


def sent_reply(context: Context, request: Request) -> Reply | None:
    """Return the reply with the model last sent in the request's round, or None where it was not kept.

    The reply comes without statistics.
    """
    return _reply(context, _SENT, request)


def keep_start(context: Context, request: Request, content: RecordDict) -> None:
    """Keep the content of the request that a round starts with, for its global model."""
    _put(context, _START, content, request.arrays_key)


def round_start(context: Context) -> State:
    """Return the global model that the round started with."""
    return Request.from_message(_get(context, _START)).anchor


def keep_fused(context: Context, request: Request, content: RecordDict) -> None:
    """Keep a request's piece of the fused model; piece 0 replaces all pieces that were kept.

    A request without tensors is a piece that the client has received before.
    """
    sequence = request.refit.sequence if request.refit else 0
    if not sequence:
        _drop(context, _PIECE)
    if request.anchor:
        _put(context, f"{_PIECE}{sequence}", content, request.arrays_key)


def fused_pieces(context: Context, request: Request) -> list[State]:
    """Return the pieces of the fused model up to the request's; an empty list where any of them is missing.

    The tensors of a later piece replace those of an earlier one. Piece 0 is the whole model as it was fused.
    """
    pieces: list[State] = []
    sequence = request.refit.sequence if request.refit else 0
    for number in range(sequence + 1):
        content = _get(context, f"{_PIECE}{number}")
        piece = Request.from_message(content) if content else None
        if piece is None or piece.round != request.round:
            return []
        pieces.append(piece.anchor)
    return pieces


def forget(context: Context) -> None:
    """Drop everything that fedbasin has kept; the app's own state stays."""
    _drop(context, _PREFIX)


def _reply(context: Context, name: str, request: Request) -> Reply | None:
    content = _get(context, name)
    reply = Reply.from_message(content, request, trusted=True) if content else None
    return reply if reply is not None and reply.round == request.round else None


def _put(context: Context, name: str, content: RecordDict, *records: str) -> None:
    for record, value in content.items():
        # Of a request, its header lies in the app's config; of a reply, in a record of its own.
        if isinstance(value, ConfigRecord) or record in records:
            context.state[f"{name}/{record}"] = value


def _get(context: Context, name: str) -> RecordDict:
    prefix = f"{name}/"
    return RecordDict(
        {key.removeprefix(prefix): record for key, record in context.state.items() if key.startswith(prefix)}
    )


def _drop(context: Context, prefix: str) -> None:
    for key in [key for key in context.state if key.startswith(prefix)]:
        del context.state[key]
