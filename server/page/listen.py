"""An HTTP application on a port, served by the loop that is already running."""

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from fedbasin.server.observe.access import Guard
from fedbasin.server.observe.connections import count_connections
from fedbasin.server.page.bounded_http import BoundedHttp

_GRACE_SECONDS = 1
_STALLED_MS = 60_000  # for a reader that takes nothing of what it was sent


class _Server(uvicorn.Server):
    """A uvicorn server that leaves the signals of the process to its owner."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override] # a generator there
        return nullcontext()


@asynccontextmanager
async def listen(app: ASGIApp, host: str, port: int, guard: Guard) -> AsyncIterator[int]:
    """Serve an application for as long as the context is open, and yield the port.

    Raises:
        OSError: the port is taken, or the certificate cannot be used.
    """
    with _bind(host, port) as listener:
        server = _Server(_config(app, guard))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            # uvicorn has no event that it sets when it has started.
            while not (server.started or serving.done()):
                await asyncio.sleep(0.005)
            if serving.done():
                serving.result()
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        # The number of a name that cannot be resolved is negative, and none of the system's.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise OSError(f"cannot listen on {address} for Prometheus and the page: {reason}") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MS)
    return listener


def _count_accepted() -> int:
    """Return how many connections asyncio may accept in one turn; those that are too many are closed in the next."""
    return max(1, min(128, count_connections() // 2))


def _config(app: ASGIApp, guard: Guard) -> uvicorn.Config:
    """Return a configuration that logs nothing, and requires in TLS what the gRPC port requires."""
    # No logs: the output of `fedbasin observe --json` is the addresses, which programs read.
    return uvicorn.Config(
        app,
        http=partial(BoundedHttp, most=count_connections()),  # type: ignore[arg-type] # a class there
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        backlog=_count_accepted(),
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        ssl_certfile=guard.cert,
        ssl_keyfile=guard.key,
        ssl_ca_certs=str(guard.client_ca) if guard.client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if guard.client_ca else ssl.CERT_NONE,
    )
