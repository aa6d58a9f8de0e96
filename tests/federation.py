"""A whole federation in this process: real client apps, real mods, the real server; only the wire is missing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from tests.server.fake_grid import FakeGrid

Tamper = Callable[[Message], Message | None]


@dataclass
class Federation:
    """Clients with node ids 100, 101, ... that answer with their app, in their own context.

    Attributes:
        app: what every client runs.
        run_config: of server and clients.
        clients: how many.
        tamper: changes a node's reply on its way.
    """

    app: ClientApp
    run_config: dict[str, Any]
    clients: int
    tamper: Mapping[int, Tamper] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.contexts = {
            100 + index: Context(
                1,
                100 + index,
                {"partition-id": index, "num-partitions": self.clients},
                RecordDict(),
                dict(self.run_config),
            )
            for index in range(self.clients)
        }
        self.asked: list[Message] = []

    def grid(self, **how: Any) -> FakeGrid:
        return FakeGrid(self.contexts, self.answer, **how)

    def server_context(self, **extra: Any) -> Context:
        return Context(1, 1, {}, RecordDict(), {**self.run_config, **extra})

    def answer(self, message: Message) -> Message | None:
        self.asked.append(message)
        node = message.metadata.dst_node_id
        try:
            reply = self.app(message, self.contexts[node])
        except Exception as error:  # noqa: BLE001 - what Flower's ClientApp process does
            reply = Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
        return self.tamper[node](reply) if node in self.tamper else reply
