"""What a client keeps between the stages of a round, in its Flower context.

The state lives in the SuperNode's memory: one that restarted in between has lost it, and the client then
trains again, or answers without.
"""

from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict
from torch import Tensor

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.strategies.state import State

_ARRAYS = "fedbasin.kept-arrays"
_METRICS = "fedbasin.kept-metrics"
_HEADER = "fedbasin.kept-header"
_SENT_ARRAYS = "fedbasin.sent-arrays"
_SENT_HEADER = "fedbasin.sent-header"
_FUSED_ARRAYS = "fedbasin.fused-arrays"
_FUSED_HEADER = "fedbasin.fused-header"
_BASE_ARRAYS = "fedbasin.base-arrays"
_BEGUN_ARRAYS = "fedbasin.begun-arrays"
_BEGUN_HEADER = "fedbasin.begun-header"

_KEPT = (
    _ARRAYS,
    _METRICS,
    _HEADER,
    _SENT_ARRAYS,
    _SENT_HEADER,
    _FUSED_ARRAYS,
    _FUSED_HEADER,
    _BASE_ARRAYS,
    _BEGUN_ARRAYS,
    _BEGUN_HEADER,
)


def keep(context: Context, server_round: int, state: State, metrics: dict[str, float]) -> None:
    """Remember the trained model of this round, in place of any earlier one."""
    arrays, specs = packing.pack(state)
    header = pb.UpdateHeader(round=server_round, tensors=specs)
    context.state[_ARRAYS] = arrays
    context.state[_METRICS] = MetricRecord({**metrics})
    context.state[_HEADER] = ConfigRecord({"header": header.SerializeToString()})


def kept(context: Context, server_round: int) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """The model trained in this round and its metrics, if the client still has them."""
    if _ARRAYS not in context.state:
        return None
    header = pb.UpdateHeader.FromString(wire.header_bytes(context.state, _HEADER))
    if header.round != server_round:
        return None
    state = packing.unpack(context.state.array_records[_ARRAYS], header.tensors)
    return state, wire.numbers(context.state.metric_records[_METRICS])


def keep_sent(context: Context, content: RecordDict) -> None:
    """Remember the model in a packed reply, in place of any earlier one."""
    context.state[_SENT_ARRAYS] = content[wire.ARRAYS]
    context.state[_SENT_HEADER] = content[wire.HEADER]


def sent(context: Context, server_round: int) -> dict[str, Tensor] | None:
    """The floating tensors that were last sent in this round, if the client still has them."""
    if _SENT_ARRAYS not in context.state:
        return None
    header = pb.UpdateHeader.FromString(wire.header_bytes(context.state, _SENT_HEADER))
    if header.round != server_round:
        return None
    return packing.unpack(context.state.array_records[_SENT_ARRAYS], header.tensors)


def keep_begun(context: Context, state: State) -> None:
    """Remember the global model that a round began with."""
    context.state[_BEGUN_ARRAYS], specs = packing.pack(state)
    header = pb.Request(anchor=specs)
    context.state[_BEGUN_HEADER] = ConfigRecord({"header": header.SerializeToString()})


def begun(context: Context) -> dict[str, Tensor]:
    """The global model that the round began with."""
    header = pb.Request.FromString(wire.header_bytes(context.state, _BEGUN_HEADER))
    return packing.unpack(context.state.array_records[_BEGUN_ARRAYS], header.anchor)


def sent_examples(context: Context) -> float:
    """The weight that went with the model that was last sent."""
    return pb.UpdateHeader.FromString(wire.header_bytes(context.state, _SENT_HEADER)).examples


def keep_fused(context: Context, server_round: int, sequence: int, state: State) -> None:
    """Remember the fused model of this round as far as it has got, in place of what was known of it."""
    context.state[_FUSED_ARRAYS], specs = packing.pack(state)
    if not sequence:
        context.state[_BASE_ARRAYS] = context.state[_FUSED_ARRAYS]
    header = pb.Request(round=server_round, anchor=specs, fit=pb.Fit(sequence=sequence))
    context.state[_FUSED_HEADER] = ConfigRecord({"header": header.SerializeToString()})


def fused_so_far(context: Context, server_round: int, sequence: int) -> dict[str, Tensor] | None:
    """The fused model that the piece of this sequence completes, if the client has it.

    A piece that came before may come again.
    """
    if _FUSED_ARRAYS not in context.state:
        return None
    header = pb.Request.FromString(wire.header_bytes(context.state, _FUSED_HEADER))
    if header.round != server_round or header.fit.sequence not in (sequence - 1, sequence):
        return None
    return packing.unpack(context.state.array_records[_FUSED_ARRAYS], header.anchor)


def fused_at_first(context: Context) -> dict[str, Tensor]:
    """The fused model of this round as its first piece brought it."""
    header = pb.Request.FromString(wire.header_bytes(context.state, _FUSED_HEADER))
    return packing.unpack(context.state.array_records[_BASE_ARRAYS], header.anchor)


def forget(context: Context) -> None:
    """Drop what was kept."""
    for name in _KEPT:
        context.state.pop(name, None)
