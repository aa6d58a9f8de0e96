"""What a client keeps between the stages of a round, in its Flower context.

The state lives in the SuperNode's memory: one that restarted in between has lost it, and the client then
trains again.
"""

from flwr.app import ConfigRecord, Context, MetricRecord
from torch import Tensor

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.strategies.state import State

_ARRAYS = "fedbasin.kept-arrays"
_METRICS = "fedbasin.kept-metrics"
_HEADER = "fedbasin.kept-header"


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


def forget(context: Context) -> None:
    """Drop what was kept."""
    for name in (_ARRAYS, _METRICS, _HEADER):
        context.state.pop(name, None)
