"""Pulls of single replies from the SuperLink, each with a bound on its time and on its bytes.

A reply consists of objects: the message, its records, the arrays and their chunks. The SuperLink lists their ids before
any of them is transferred, and tells the size of each in the header of its response. So a reply that is too large ends
where its limit is reached, and not after hundreds of megabytes.

This is the one place that knows the inside of Flower's grid. Other grids, as the one of a simulation, hand over
messages that are in memory already.
"""

import copy
import sys
import threading
import time
from typing import TYPE_CHECKING

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

if TYPE_CHECKING:
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

# In the reason of the error that takes the place of a reply whose transfer was ended.
TOO_LARGE = "the reply has more bytes than"

# Bytes of a reply beside its arrays: names, shapes and the hashes of its objects.
_SLACK_BYTES = 2**18


class Pulls:
    """Pulls of single replies; one whose transfer takes long goes on in the background.

    A reply shows before its arrays have been uploaded, and a pull waits for them: without this, one
    slow upload would hold up the whole round, past every deadline.
    """

    def __init__(self, grid: Grid, patience_seconds: float, max_bytes: int | None = None) -> None:
        self._grid = grid
        self._patience_seconds = patience_seconds
        self._max_bytes = max_bytes
        self._slow: dict[str, Pull] = {}

    def pull(self, message_id: str, deadline: float) -> Message | None:
        """Return the reply to this message, if it is there."""
        pull = self._slow.pop(message_id, None)
        patience = 0.0 if pull else min(self._patience_seconds, deadline - time.monotonic())
        pull = pull or Pull(bounded(self._grid, self._max_bytes), message_id)
        pull.join(max(0.0, patience))
        if pull.is_alive():
            self._slow[message_id] = pull
            return None
        return pull.take()


class Pull(threading.Thread):
    """One look for a reply, with its transfer, in a thread of its own."""

    def __init__(self, grid: Grid, message_id: str) -> None:
        super().__init__(name=f"pull {message_id}", daemon=True)
        self._grid = grid
        self._message_id = message_id
        self._outcome: list[Message] | BaseException = []
        self.start()

    def run(self) -> None:
        try:
            self._outcome = list(self._grid.pull_messages([self._message_id]))
        except BaseException as error:  # noqa: BLE001 - take() raises it, in the thread that asked
            self._outcome = error

    def take(self) -> Message | None:
        """Return the reply, or raise what the grid raised."""
        outcome, self._outcome = self._outcome, []
        if isinstance(outcome, BaseException):
            raise outcome
        answers = (m for m in outcome if m.metadata.reply_to_message_id == self._message_id)
        return next(answers, None)


def bounded(grid: Grid, max_bytes: int | None) -> Grid:
    """Return a view of a grid that transfers one reply, and ends the transfer where it is too large.

    The grid then has an error in place of the reply.

    Args:
        grid: Flower's grid.
        max_bytes: bytes of the reply's arrays; None for no limit.
    """
    # Its module imports a web server, which a process without such a grid need not have.
    module = sys.modules.get("flwr.superlink.grid.http_grid")
    if max_bytes is None or module is None or not isinstance(grid, module.HttpGrid):
        return grid
    view = copy.copy(grid)
    client = copy.copy(grid._runtime_client)
    # The last interceptor is the one next to the network.
    client._interceptors = (*client._interceptors, _ByteLimit(client._client, max_bytes))
    view._client = client
    return view


class _ByteLimit:
    """An interceptor of Flower's client that counts the bytes of one reply's objects before it reads them."""

    def __init__(self, client: httpx.Client, max_bytes: int) -> None:
        self._client = client
        self._max_bytes = max_bytes
        self._left = max_bytes + _SLACK_BYTES
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()

    def intercept(self, context: "ProtobufRequestContext", call_next: "ProtobufCall") -> httpx.Response:
        if not context.rpc_method.endswith("/PullObject"):
            return call_next(context)
        response = self._client.send(context.request, stream=True)
        try:
            self._count(context.message.object_id, int(response.headers.get("content-length", 0)))  # type: ignore[attr-defined]
            response.read()
        finally:
            response.close()
        return response

    def _count(self, object_id: str, size: int) -> None:
        with self._lock:  # Flower pulls several objects at once
            # By object: a request that failed, or came before the object was there, is repeated.
            self._left -= size - self._sizes.get(object_id, 0)
            self._sizes[object_id] = size
            if self._left < 0:
                raise ObjectPullError(object_id, f"{TOO_LARGE} max-update-bytes = {self._max_bytes}; not transferred")
