"""What a federation costs: bytes of messages, and the processor time of clients and of the server."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict

from tests.federation import Federation


@dataclass
class Meter:
    """Sums since the start. Time of this process, not of the clock, which other work would stretch."""

    bytes_up: int = 0
    bytes_down: int = 0
    client_seconds: float = 0.0
    server_seconds: float = 0.0
    _since: float = field(default_factory=time.process_time)

    @contextmanager
    def client(self) -> Iterator[None]:
        """A client works; until then it was the server."""
        self._server()
        yield
        now = time.process_time()
        self.client_seconds += now - self._since
        self._since = now

    @contextmanager
    def nobody(self) -> Iterator[None]:
        """What the measuring itself takes."""
        self._server()
        yield
        self._since = time.process_time()

    def _server(self) -> None:
        now = time.process_time()
        self.server_seconds += now - self._since
        self._since = now


@dataclass
class MeteredFederation(Federation):
    """Clients in this process whose messages are weighed and whose errors end the run."""

    meter: Meter = field(default_factory=Meter)

    def answer(self, message: Message) -> Message | None:
        self.meter.bytes_down += weight(message.content)
        node = message.metadata.dst_node_id
        with self.meter.client():
            reply = super().answer(message)
        self.asked.clear()  # it would keep every model of the run
        if reply is None or reply.has_error():
            reason = "no reply" if reply is None else reply.error.reason
            raise RuntimeError(f"client {node - 100}: {reason}")
        self.meter.bytes_up += weight(reply.content)
        return reply


def weight(content: RecordDict) -> int:
    """Bytes of all records, as Flower counts them."""
    return sum(record.count_bytes() for record in content.values())
