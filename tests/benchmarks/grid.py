"""A grid whose nodes answer in this process: a reply's bytes are made when it is pulled, and not before."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import wire


class PulledGrid(Grid):
    """Every node has answered at once, with an array of random numbers that no other node has."""

    def __init__(self, nodes: int, elements: int) -> None:
        # What Flower sets in the process of a ServerApp; messages cannot be made without.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._nodes = list(range(1, nodes + 1))
        self._elements = elements
        self._asked: dict[str, Message] = {}
        self._count = 0

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        self._count += 1
        key = message.metadata.__dict__["_message_id"] = f"message {self._count}"
        self._asked[key] = message
        return key

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._answer(self._asked.pop(key)) for key in message_ids if key in self._asked]

    def _answer(self, message: Message) -> Message:
        draw = np.random.default_rng(self._count + message.metadata.dst_node_id)
        arrays = ArrayRecord({"float32": Array(draw.random(self._elements, np.float32))})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 10})})
        if wire.has_header(message.content):
            asked = wire.read_request(message.content)
            header = pb.UpdateHeader(
                round=asked.round,
                stage=asked.stage,
                anchor_digest=asked.anchor_digest,
                examples=10,
                tensors=asked.anchor,
            )
            wire.write(content, header)
        return Message(content, reply_to=message)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """As Flower's own grids: all replies in one list."""
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
