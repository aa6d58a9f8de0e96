"""A request of the server as one client reads it."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from flwr.app import RecordDict

from fedbasin.proto.request import Request
from fedbasin.strategies.diagnostics.probe_sampling import draw
from fedbasin.strategies.tensors.batches import Batches

Data: TypeAlias = Callable[[], Batches]


class MissingDataError(ValueError):
    """A request for something that only the client's data can answer, where the mod has no data."""


def read_request(content: RecordDict, node_id: int = 0) -> Request:
    """Read the message of a fedbasin server, with this node's part in it.

    The node's draw is the seed of everything random in the reply. A node whose draw exceeds `probe_bound` is not in
    the sample of the clients that evaluate the path, so its request has no `path_points`.

    Args:
        content: content of the message.
        node_id: id of the node that reads it.

    Raises:
        WireError: the content is not a request, or is of another version.
        PackingError: the tensors do not parse.
    """
    request = Request.from_message(content)
    # The draw depends on node and round alone: a request that is repeated gets the same reply.
    seed = draw(node_id, request.round)
    is_sampled = request.probe_bound is None or seed <= request.probe_bound
    return replace(request, seed=seed, path_points=request.path_points if is_sampled else 0)


def required(data: Data | None, purpose: str) -> Data:
    """Return the data, or raise an error that names the purpose.

    Raises:
        MissingDataError: there is no data.
    """
    if data is None:
        raise MissingDataError(f"{purpose} needs the client's data; pass `data` to fedbasin.client.basin")
    return data
