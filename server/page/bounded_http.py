"""HTTP for peers who need not be friendly: a bounded number of connections, and requests that come in time.

uvicorn waits for ever for the rest of a request, and accepts connections until the process has no file left.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0


class BoundedHttp(H11Protocol):
    """A connection that is closed where no request is complete within `HEADER_SECONDS`.

    Beyond the most connections, the one that has been without a request for longest goes; where all are being
    answered, the new one.
    """

    def __init__(self, *arguments: Any, most: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most = most
        self._idle_since = self.loop.time()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_busy(self) -> bool:
        """Return True while a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEADER_SECONDS, self._check_idle)
        if len(self.connections) > self._most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def _make_room(self) -> None:
        # Those that are closing leave `connections` only when the loop comes round.
        still_open = [
            peer for peer in self.connections if isinstance(peer, BoundedHttp) and not peer.transport.is_closing()
        ]
        if len(still_open) > self._most:
            idle = [peer for peer in still_open if not peer.is_busy]
            min(idle, key=lambda peer: peer._idle_since, default=self).transport.abort()

    def _check_idle(self) -> None:
        # What was answered and not read yet is the kernel's to time out.
        left = self._idle_since + HEADER_SECONDS - self.loop.time()
        if self.is_busy or self.transport.get_write_buffer_size() or left > 0:
            self._timer = self.loop.call_later(max(left, 1.0), self._check_idle)
        else:
            self.transport.abort()
