"""A stage's question as a client reads it, and what every answer begins with."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from flwr.app import RecordDict
from torch import Tensor

from fedbasin.client.data import Batches
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, plain, wire
from fedbasin.strategies.diagnostics.probe_sampling import draw

Data: TypeAlias = Callable[[], Batches]


class MissingDataError(ValueError):
    """The server asks for what only the client's data can say, and the mod was given none."""


@dataclass(frozen=True, eq=False)
class Request:
    """A stage's question, read from a message.

    Attributes:
        header: as sent.
        anchor: the global model.
        radii: the anchor's identity radii, by space.
        path_points: points of the path that this client is to evaluate; 0 for none.
        moving: the floating tensors of a merge to align in place of the client's own model; empty for none.
        seed: of what this client draws in this round.
    """

    header: pb.Request
    anchor: dict[str, Tensor]
    radii: dict[str, Tensor]
    path_points: int = 0
    moving: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0


def read_request(content: RecordDict, node_id: int = 0) -> Request:
    """Read a message that `fedbasin.server` sent.

    Args:
        content: of the message.
        node_id: whose it is; decides whether this client is among those that probe, and what it draws.

    Raises:
        WireError: it is no such message, or of another version.
        PackingError: its tensors do not parse.
    """
    header = wire.read_request(content)
    arrays = wire.arrays(content, wire.ARRAYS)
    anchor = packing.unpack(arrays, header.anchor) if header.anchor else plain.read(arrays)
    radii = _beside(content, wire.RADII, header.radii)
    moving = _beside(content, wire.MOVING, header.moving)
    seed = draw(node_id, header.round)
    probes = not header.HasField("probe_bound") or seed <= header.probe_bound
    return Request(header, anchor, radii, header.path_points if probes else 0, moving, seed)


def _beside(content: RecordDict, record: str, specs: Iterable[pb.TensorSpec]) -> dict[str, Tensor]:
    """The tensors of a record that only some requests have."""
    listed = list(specs)
    return packing.unpack(wire.arrays(content, record), listed) if listed else {}


def answer(request: Request) -> pb.UpdateHeader:
    """The header of a reply, which says what it answers."""
    asked = request.header
    return pb.UpdateHeader(round=asked.round, stage=asked.stage, anchor_digest=asked.anchor_digest)


def required(data: Data | None, what: str) -> Data:
    """The data, or an error that says what it is needed for."""
    if data is None:
        raise MissingDataError(
            f"{what} needs the client's data; pass `data` to fedbasin.client.basin"
        )
    return data
