"""A grid without a SuperLink: nodes answer by a function, late, wrongly, twice or never."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

SUPERLINK_NODE_ID = 1


def http_error(status: int) -> httpx.HTTPStatusError:
    """What Flower's HttpGrid raises on an answer of this status."""
    response = httpx.Response(status, request=httpx.Request("POST", "http://superlink"))
    return httpx.HTTPStatusError(f"HTTP {status}", request=response.request, response=response)


class FakeGrid(Grid):
    """Nodes that answer in this process.

    Args:
        node_ids: the nodes online.
        answer: the reply to a message (`Message(content, reply_to=message)`), or None for silence.
        latency: seconds from sending to answering, by node id.
        push_failures, pull_failures, node_failures: raised by the next calls, in this order.
        upload_seconds: how long pulling a node's reply takes, by node id.
        duplicates: whether a reply can be pulled again and again.
        strays: replies that every pull returns unasked.
    """

    def __init__(
        self,
        node_ids: Iterable[int],
        answer: Callable[[Message], Message | None],
        latency: Callable[[int], float] = lambda node_id: 0.0,
        *,
        push_failures: Iterable[BaseException] = (),
        pull_failures: Iterable[BaseException] = (),
        node_failures: Iterable[BaseException] = (),
        upload_seconds: Callable[[int], float] = lambda node_id: 0.0,
        duplicates: bool = False,
        strays: Iterable[Message] = (),
    ) -> None:
        # What Flower sets in the process of a ServerApp; messages cannot be made without.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
        self.node_ids = list(node_ids)
        self.answer = answer
        self.latency = latency
        self.push_failures = list(push_failures)
        self.pull_failures = list(pull_failures)
        self.node_failures = list(node_failures)
        self.upload_seconds = upload_seconds
        self.duplicates = duplicates
        self.strays = list(strays)
        self.pushed = 0
        self.pulls: list[str] = []
        self._inbox: dict[str, tuple[float, Message]] = {}

    def get_node_ids(self) -> list[int]:
        _raise_next(self.node_failures)
        return list(self.node_ids)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        _raise_next(self.push_failures)
        return [self._send(message) for message in messages]

    def _send(self, message: Message) -> str:
        node_id = message.metadata.dst_node_id
        self.pushed += 1
        message.metadata.__dict__["_message_id"] = f"message {self.pushed}"
        if node_id not in self.node_ids:
            return ""
        reply = self.answer(message)
        if reply is not None:
            due = time.monotonic() + self.latency(node_id)
            self._inbox[message.metadata.message_id] = (due, reply)
        return message.metadata.message_id

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        asked = list(message_ids)
        self.pulls += asked
        _raise_next(self.pull_failures)
        return self.strays + [reply for key in asked for reply in self._receive(key)]

    def _receive(self, message_id: str) -> list[Message]:
        due, reply = self._inbox.get(message_id, (float("inf"), None))
        if reply is None or time.monotonic() < due:
            return []
        time.sleep(self.upload_seconds(reply.metadata.src_node_id))
        if not self.duplicates:
            self._inbox.pop(message_id, None)
        return [reply]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Any:
        raise AssertionError("Flower's own loop is what a StreamingGrid replaces")

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def _raise_next(failures: list[BaseException]) -> None:
    if failures:
        raise failures.pop(0)


class ListGrid(FakeGrid):
    """Gives all replies as one list, as Flower's own grid does."""

    def send_and_receive(self, messages, *, timeout=None):
        keys = self.push_messages(list(messages))
        return self.pull_messages([key for key in keys if key])
