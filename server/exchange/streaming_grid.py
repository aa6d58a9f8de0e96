"""Flower's grid, with the replies handed over one by one as they arrive.

Flower's own grids collect every reply in a list and look for more every three seconds, for as long as it
takes. Here each reply is pulled alone and belongs to the caller from then on, so that memory does not
grow with the number of nodes; and a deadline, a quorum and retries bound what a silent node can do.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedbasin.proto.report import ACCEPTED, ClientReport, StageReport
from fedbasin.server.exchange.message_limits import shortened
from fedbasin.server.exchange.reply_pulls import Pulls

if TYPE_CHECKING:  # Flower's internals, which its own signatures name
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.supercore.run import Run

T = TypeVar("T")

_IDS_PER_TICK = 8  # one request each, so that a tick of a large round stays short
_SHARE_OF_WAIT = 0.02  # of the time waited so far, at which a reply may lie unnoticed
_LONGEST_REST_SECONDS = 2.0
_LONGEST_BACKOFF_SECONDS = 10.0


class TooFewNodesError(TimeoutError):
    """Fewer nodes came online in time than were asked for."""


@dataclass(frozen=True)
class NodeReply:
    """The reply of one node, or the reason why there is none.

    Attributes:
        node_id: the node that was asked, also where the SuperLink answered in its place.
        message: the reply, with content or with an error; None if none came.
        seconds: from sending to receiving, or to giving up.
        problem: why there is no content; empty if there is.
        left_out: whether the app's own code took the reply and did not hand it on.
    """

    node_id: int
    message: Message | None
    seconds: float
    problem: str = ""
    left_out: bool = False


@dataclass(frozen=True)
class Quorum:
    """A number of replies with content that is enough, and the time to wait for more once they are in."""

    replies: int
    grace_seconds: float = 0.0


class StageReplies(Iterable[Message]):
    """The replies to one batch of messages: as messages for Flower, and with node and time for the report.

    A strategy that overrides `aggregate_train` reads messages and hands some on; which it left out is known here.
    """

    def __init__(self, replies: "NodeReplies") -> None:
        self._replies = replies
        self._read: dict[str, NodeReply] = {}

    def __iter__(self) -> Iterator[Message]:
        for reply in self._replies:
            key = reply.message.metadata.reply_to_message_id if reply.message else ""
            # Without its content: memory is not to grow with the number of clients.
            self._read[key or f"node {reply.node_id}"] = replace(reply, message=None)
            if reply.message is not None:
                yield reply.message

    def report(self, stage: str) -> StageReport:
        """Return a report of what was read, for a strategy that aggregates without this project's code."""
        return StageReport(
            stage,
            clients=tuple(
                ClientReport(
                    reply.node_id,
                    "timeout" if key.startswith("node ") else ACCEPTED,
                    reply.problem,
                    seconds=reply.seconds,
                )
                for key, reply in self._read.items()
            ),
        )

    def node_replies(self) -> Iterator[NodeReply]:
        """Return the replies as they arrive, with node and time."""
        return self._replies

    @property
    def unanswered(self) -> dict[str, int]:
        """The nodes whose replies have not come, by the id of the message."""
        return self._replies.unanswered

    def restored(self, messages: Iterable[Message]) -> Iterator[NodeReply]:
        """Return what was handed on of the messages that were read, and then all that was not."""
        rest = dict(self._read)
        for message in messages:
            reply = rest.pop(message.metadata.reply_to_message_id, None)
            if reply is not None:
                yield replace(reply, message=message)
        for key, reply in rest.items():
            silent = key.startswith("node ")
            problem = reply.problem or "read by aggregate_train and not handed on"
            yield replace(reply, problem=problem, left_out=not silent)


class StreamingGrid(Grid):
    """A grid that streams replies, and leaves all else to the grid it wraps.

    Flower's adaptive-clipping wrappers go through the replies twice and need a list of them instead.
    """

    def __init__(
        self, inner: Grid, poll_seconds: float = 0.2, patience_seconds: float = 5.0, max_bytes: int | None = None
    ) -> None:
        """Wraps a grid.

        Args:
            inner: Flower's grid.
            poll_seconds: the shortest time between two looks for replies.
            patience_seconds: how long the transfer of one reply may hold up the others; after it, the
                transfer goes on beside them.
            max_bytes: bytes of one reply at which its transfer ends; None for no limit.
        """
        self._inner = inner
        self._poll_seconds = poll_seconds
        self._patience_seconds = patience_seconds
        self._max_bytes = max_bytes

    def stream(
        self,
        messages: Iterable[Message],
        timeout_seconds: float,
        quorum: Quorum | None = None,
        *,
        awaited: Mapping[str, int] | None = None,
        late: Mapping[str, int] | None = None,
    ) -> "NodeReplies":
        """Sends messages, now, and gives one reply for each, in the order of arrival.

        Nodes that stay silent come last. The clock stands still while the caller works on a reply, so a
        slow caller loses nobody. Replies to anything else than these messages are ignored.

        Args:
            messages: the messages.
            timeout_seconds: time after which nobody is waited for.
            quorum: the number of replies that is enough; None for all.
            awaited: nodes by the ids of messages that were sent before, whose replies are waited for too.
            late: nodes by the ids of messages that were sent before, whose replies are given where they come
                in the meantime. Nobody waits for them.

        Raises:
            httpx.HTTPError: the messages could not be sent before the deadline, or the SuperLink refuses
                (a status below 500 that does not ask to wait), then or later.
        """
        batch = list(messages)
        sent = time.monotonic()
        accepted = set(_push(self._inner, batch, sent + timeout_seconds))
        nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in batch}
        # Not by position: a grid may leave out the messages that it does not accept.
        waiting = {key: node for key, node in nodes.items() if key in accepted}
        refused = [node for key, node in nodes.items() if key not in accepted]
        pulls = Pulls(self._inner, self._patience_seconds, self._max_bytes)
        rhythm = _Rhythm(self._poll_seconds, sent)
        waiting = {**(awaited or {}), **waiting}
        replies = NodeReplies(pulls, rhythm, waiting, late or {}, sent + timeout_seconds, quorum)
        replies.add_silent(refused, "the SuperLink did not take the message (node gone, too large?)")
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Sends messages and gives the replies as they arrive, once; silent nodes are left out."""
        replies = self.stream(messages, float("inf") if timeout is None else timeout)
        # A generator would hold on to its loop variable while it waits for the next reply.
        return filter(None, map(attrgetter("message"), replies))

    def set_run(self, run: "Run") -> None:
        """See the wrapped grid."""
        self._inner.set_run(run)

    @property
    def run(self) -> "Run":
        """See the wrapped grid."""
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See the wrapped grid."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See the wrapped grid."""
        return self._inner.get_node_ids()

    def get_nodes(self) -> "Iterable[NodeInfo]":
        """See the wrapped grid."""
        return self._inner.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See the wrapped grid."""
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See the wrapped grid."""
        return self._inner.pull_messages(message_ids)


def await_nodes(grid: Grid, at_least: int, timeout_seconds: float) -> list[int]:
    """Return the ids of the nodes online, ascending, as soon as there are enough of them.

    Raises:
        TooFewNodesError: they did not come in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while len(nodes := sorted(_persist(grid.get_node_ids, deadline))) < at_least:
        if time.monotonic() >= deadline:
            raise TooFewNodesError(
                f"{len(nodes)} of {at_least} nodes came online within {timeout_seconds:g} s "
                f"({nodes}); start the missing SuperNodes, or ask for fewer nodes"
            )
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
    return nodes


def match_replies(messages: Iterable[Message], replies: Iterable[Message]) -> Iterator[NodeReply]:
    """Give the first reply to each message with the node that was asked; silent nodes come last.

    The SuperLink signs the errors that it makes with its own id, so the sender says too little.
    """
    waiting = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
    for reply in replies:
        node = waiting.pop(reply.metadata.reply_to_message_id, None)
        if node is not None:
            yield NodeReply(node, reply, 0.0)
    for node in waiting.values():
        yield NodeReply(node, None, 0.0, "no reply")


class NodeReplies(Iterator[NodeReply]):
    """The replies to one batch of messages.

    An iterator by hand, and no generator, so that nothing holds a reply once it was handed over.
    """

    def __init__(
        self,
        pulls: Pulls,
        rhythm: "_Rhythm",
        waiting: dict[str, int],
        late: Mapping[str, int],
        deadline: float,
        quorum: Quorum | None,
    ) -> None:
        self._pulls = pulls
        self._rhythm = rhythm
        self._waiting = waiting  # message id: node id, those asked longest ago first
        self._late = dict(late)
        self._given_up: dict[str, int] = {}
        self._sent = rhythm.heard
        self._deadline = deadline
        self._quorum = quorum
        self._with_content = 0
        self._ready: list[NodeReply] = []
        self._handed_over = time.monotonic()

    def __next__(self) -> NodeReply:
        self._deadline += time.monotonic() - self._handed_over
        while self._waiting and not self._ready:
            if time.monotonic() >= self._deadline:
                self._give_up()
            elif not self._look(self._waiting) and not self._look(self._late):
                time.sleep(self._rhythm.rest(self._deadline))
        if not self._ready:
            self._look(self._late, count=len(self._late))
        self._handed_over = time.monotonic()
        if not self._ready:
            raise StopIteration
        return self._ready.pop()

    @property
    def unanswered(self) -> dict[str, int]:
        """The nodes whose replies have not come so far, by the id of the message."""
        return {**self._late, **self._given_up, **self._waiting}

    def add_silent(self, nodes: Iterable[int], problem: str) -> None:
        """Notes that these nodes will not answer."""
        seconds = time.monotonic() - self._sent
        self._ready += [NodeReply(node, None, seconds, problem) for node in nodes]

    def _give_up(self) -> None:
        seconds = time.monotonic() - self._sent
        problem = f"no reply within {seconds:.1f} s{self._rhythm.last_failure}"
        if self._has_quorum():
            problem = f"not waited for: {self._with_content} others were enough"
        self.add_silent(self._waiting.values(), problem)
        self._given_up, self._waiting = self._waiting, {}

    def _look(self, waiting: dict[str, int], count: int = _IDS_PER_TICK) -> bool:
        """Look at the next few nodes; return True if one of them has replied."""
        if not waiting:
            return False
        for key in tuple(islice(waiting, count)):
            waiting[key] = waiting.pop(key)  # to the back of the queue
            try:
                message = self._pulls.pull(key, self._deadline)
            except httpx.HTTPError as error:
                if not _is_transient(error):
                    raise
                self._rhythm.failed(error)
                return False
            if message is not None:
                node = waiting.pop(key)
                self._receive(node, message)
                if waiting is self._late and message.has_content():
                    # It will not do the same work again for the request that repeated this one.
                    self._waiting = {k: n for k, n in self._waiting.items() if n != node}
                return True
        self._rhythm.succeeded()
        return False

    def _receive(self, node: int, message: Message) -> None:
        # The node is the one that was asked: the SuperLink signs the errors it makes with its own id.
        self._rhythm.heard = time.monotonic()
        problem = ""
        if message.has_error():
            problem = f"error {message.error.code}: {shortened(str(message.error.reason))}"
        self._ready.append(NodeReply(node, message, self._rhythm.heard - self._sent, problem))
        self._with_content += not problem
        if self._quorum and not problem and self._has_quorum():
            grace = self._rhythm.heard + self._quorum.grace_seconds
            self._deadline = min(self._deadline, grace)

    def _has_quorum(self) -> bool:
        return self._quorum is not None and self._with_content >= self._quorum.replies


class _Rhythm:
    """The rest between two looks: longer the longer nobody replies, and after failures."""

    def __init__(self, poll_seconds: float, now: float) -> None:
        self._poll_seconds = poll_seconds
        self._failures = 0
        self.heard = now
        self.last_failure = ""

    def failed(self, error: Exception) -> None:
        self._failures += 1
        self.last_failure = f"; the last request to the SuperLink failed: {error}"

    def succeeded(self) -> None:
        self._failures = 0
        self.last_failure = ""

    def rest(self, deadline: float) -> float:
        now = time.monotonic()
        shared = min(_SHARE_OF_WAIT * (now - self.heard), _LONGEST_REST_SECONDS)
        backoff = min(self._poll_seconds * 2.0**self._failures, _LONGEST_BACKOFF_SECONDS)
        return max(0.0, min(max(shared, backoff), deadline - now))


# A server, or a proxy before it, that has no time now.
_WAIT = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_EARLY, httpx.codes.TOO_MANY_REQUESTS)


def _push(grid: Grid, batch: list[Message], deadline: float) -> list[str]:
    # Sending twice is harmless: the SuperLink knows a message by the digest of its content.
    return _persist(lambda: grid.push_messages(batch), deadline) if batch else []


def _persist(request: Callable[[], Iterable[T]], deadline: float) -> list[T]:
    """Repeats a request until it gets through, and raises its failure at the deadline."""
    delay = 0.25
    while True:
        try:
            return list(request())
        except httpx.HTTPError as error:
            if not _is_transient(error) or time.monotonic() + delay >= deadline:
                raise
        time.sleep(delay)
        delay = min(2 * delay, _LONGEST_BACKOFF_SECONDS)


def _is_transient(error: httpx.HTTPError) -> bool:
    """A failure on the way or within the SuperLink, or a request to wait, rather than its refusal."""
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        return status >= httpx.codes.INTERNAL_SERVER_ERROR or status in _WAIT
    return isinstance(error, httpx.TransportError)
