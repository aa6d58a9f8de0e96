"""What a client keeps between the stages of a round, in its Flower context.

Models are kept in the records in which they were sent or came, so keeping one copies nothing. The state lives in
the SuperNode's memory: one that restarted in between has lost it, and the client then trains again, or answers
without.
"""

from typing import TypeVar

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from torch import Tensor

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, plain, wire
from fedbasin.strategies.tensors.state import State

_OURS = "fedbasin."
_TRAINED = f"{_OURS}trained"
_METRICS = f"{_OURS}trained-metrics"
_SENT = f"{_OURS}sent"
_BEGUN = f"{_OURS}begun"
_PIECE = f"{_OURS}fused-"

_Header = TypeVar("_Header", pb.Request, pb.UpdateHeader)


def keep(context: Context, server_round: int, state: State, metrics: dict[str, float]) -> None:
    """Remember the trained model of this round, in place of any earlier one."""
    content = RecordDict()
    content[wire.ARRAYS], specs = packing.pack(state)
    wire.write(content, pb.UpdateHeader(round=server_round, tensors=specs))
    _put(context, _TRAINED, content)
    context.state[_METRICS] = MetricRecord({**metrics})


def kept(context: Context, server_round: int) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """The model trained in this round and its metrics, if the client still has them."""
    header = _of_round(server_round, context, _TRAINED, pb.UpdateHeader())
    if header is None:
        return None
    state = packing.unpack(_arrays(context, _TRAINED), header.tensors)
    return state, wire.numbers(context.state.metric_records[_METRICS])


def keep_sent(context: Context, content: RecordDict) -> None:
    """Remember the model in a packed reply, in place of any earlier one."""
    _put(context, _SENT, content)


def sent(context: Context, server_round: int) -> dict[str, Tensor] | None:
    """The floating tensors that were last sent in this round, if the client still has them."""
    header = _of_round(server_round, context, _SENT, pb.UpdateHeader())
    return None if header is None else packing.unpack(_arrays(context, _SENT), header.tensors)


def sent_examples(context: Context) -> float:
    """The weight that went with the model that was last sent."""
    return _header(context, _SENT, pb.UpdateHeader()).examples


def keep_begun(context: Context, content: RecordDict) -> None:
    """Remember the request that a round began with, for its global model."""
    _put(context, _BEGUN, content)


def begun(context: Context) -> dict[str, Tensor]:
    """The global model that the round began with."""
    return _anchor(context, _BEGUN, _header(context, _BEGUN, pb.Request()))


def keep_fused(context: Context, content: RecordDict) -> None:
    """Remember a request's piece of the fused model; the first one takes the place of all that were kept.

    One without tensors says that there is nothing new since its number last came.
    """
    sequence = wire.read_request(content).fit.sequence
    if not sequence:
        _drop(context, _PIECE)
    if wire.arrays(content, wire.ARRAYS):
        _put(context, f"{_PIECE}{sequence}", content)


def fused_pieces(context: Context, server_round: int, sequence: int) -> list[dict[str, Tensor]]:
    """The pieces of this round's fused model up to this one; empty where the client lacks any of them.

    A later piece's tensors take the place of an earlier one's; the first is the model as it was fused at first.
    """
    pieces = []
    for name in (f"{_PIECE}{number}" for number in range(sequence + 1)):
        header = _of_round(server_round, context, name, pb.Request())
        if header is None:
            return []
        pieces.append(_anchor(context, name, header))
    return pieces


def forget(context: Context) -> None:
    """Drop what was kept."""
    _drop(context, _OURS)


def _put(context: Context, name: str, content: RecordDict) -> None:
    context.state[f"{name}-arrays"] = content[wire.ARRAYS]
    context.state[f"{name}-header"] = content[wire.HEADER]


def _drop(context: Context, prefix: str) -> None:
    for name in [name for name in context.state if name.startswith(prefix)]:
        del context.state[name]


def _of_round(server_round: int, context: Context, name: str, empty: _Header) -> _Header | None:
    if f"{name}-header" not in context.state:
        return None
    header = _header(context, name, empty)
    return header if header.round == server_round else None


def _header(context: Context, name: str, empty: _Header) -> _Header:
    empty.ParseFromString(wire.header_bytes(context.state, f"{name}-header"))
    return empty


def _arrays(context: Context, name: str) -> ArrayRecord:
    return wire.arrays(context.state, f"{name}-arrays")


def _anchor(context: Context, name: str, header: pb.Request) -> dict[str, Tensor]:
    arrays = _arrays(context, name)
    return packing.unpack(arrays, header.anchor) if header.anchor else plain.read(arrays)
