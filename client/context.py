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


def forget(context: Context) -> None:
    """Drop what was kept."""
    for name in (_ARRAYS, _METRICS, _HEADER, _SENT_ARRAYS, _SENT_HEADER):
        context.state.pop(name, None)
