"""A TCP relay on loopback that delays, loses and cuts, in the place of a network that does so.

TCP hides a lost segment from both ends: it comes later, after a retransmission. So a loss is a chunk that waits for a
retransmission timeout, and all behind it on its connection wait too. A cut link carries nothing and closes nothing.
"""

import random
import socket
import threading
import time
from contextlib import suppress
from typing import Self

RETRANSMISSION_SECONDS = 1.0
_CHUNK = 2**16


class Relay:
    """A listener that forwards to an address, until it is closed."""

    def __init__(self, target: str, *, delay_seconds: float = 0.0, loss: float = 0.0, seed: int = 0) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._delay_seconds, self._loss = delay_seconds, loss
        self._draw = random.Random(seed)
        self._up = threading.Event()
        self._up.set()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.lost = self.chunks = 0
        self._start(self._accept)

    def cut(self, seconds: float) -> None:
        """Cut the link, and mend it after some time."""
        self._up.clear()
        time.sleep(seconds)
        self._up.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._up.set()
        for end in (self._listener, *self._sockets):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, work: object, *arguments: socket.socket) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                self._start(self._forward, near, far)
                self._start(self._forward, far, near)

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(_CHUNK):
                self._up.wait()
                self.chunks += 1
                is_lost = self._draw.random() < self._loss
                self.lost += is_lost
                time.sleep(self._delay_seconds + RETRANSMISSION_SECONDS * is_lost)
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)
