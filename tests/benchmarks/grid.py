"""A grid whose nodes answer in this process: a reply's bytes are made when it is pulled, and not before."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.header import has_header, read_header, write_header


class PulledGrid(Grid):
    """A grid whose nodes reply at once with random numbers of their own, in arrays like those that they were sent."""

    def __init__(self, nodes: int) -> None:
        # What Flower sets in the process of a ServerApp; messages cannot be made without.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._nodes = list(range(1, nodes + 1))
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
        arrays = {
            name: Array(draw.random(array.shape, np.float32)) for name, array in message.content["arrays"].items()
        }
        metrics = MetricRecord({"num-examples": 10})
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        if has_header(message.content):
            request = read_header(message.content, pb.Request())
            header = pb.Reply(
                round=request.round, stage=request.stage, anchor_digest=request.anchor_digest, parameters=request.anchor
            )
            write_header(content, header)
        return Message(content, reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return all replies in one list, as Flower's own grids do."""
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
