"""The process that outlives the runs: ServerApps push round reports, anyone reads, watches or scrapes them.

A ServerApp ends with its run, and a metrics endpoint inside it would too. This process stays, behind the service
`Observer` of fedbasin.proto, the standard gRPC services for health and reflection, a page for people and one for
Prometheus. Without a guard it has no login: whoever reaches its ports can read and push.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, ProcessCollector

from fedbasin.proto.observer_service import (
    SERVICE,
    CallError,
    ModelChunk,
    ObserverService,
    RunSummary,
    add_observer_service,
)
from fedbasin.proto.report import RoundReport
from fedbasin.server.observe.access import Guard
from fedbasin.server.observe.history import ClosedError, ConflictError, History
from fedbasin.server.observe.published_models import NoModelError, PublishedModels
from fedbasin.server.observe.push import LARGEST_REPORT_BYTES
from fedbasin.server.observe.store import Store
from fedbasin.server.observe.telemetry import Telemetry
from fedbasin.server.page.app import application
from fedbasin.server.page.listen import listen
from fedbasin.server.page.page_access import page_guards

_STANDARD_SERVICES = (health.SERVICE_NAME, reflection.SERVICE_NAME)
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # or a second observer would quietly take half of the calls
    ("grpc.max_receive_message_length", LARGEST_REPORT_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 60_000),  # finds watchers whose machine is gone
)
_GRACE_SECONDS = 0.5  # for pushes under way, and for watchers to learn that the observer stops


@dataclass(frozen=True)
class ObserverSettings:
    """The settings of an observer; port 0 means a free one.

    Attributes:
        host: address of both ports.
        port: port of the gRPC service.
        metrics_port: port of the page and of /metrics.
        store: folder for the reports; None keeps them in memory only.
        models: folder with run folders, whose global models may be downloaded; None publishes none.
        guard: proof that both ports require of their callers.
    """

    host: str = "127.0.0.1"
    port: int = 9470
    metrics_port: int = 9471
    store: Path | None = None
    models: Path | None = None
    guard: Guard = field(default_factory=Guard)


@dataclass(frozen=True)
class Addresses:
    """The addresses at which an observer listens."""

    observer: str
    metrics: str
    page: str


class Observer(ObserverService):
    """The service: pushes go to the store, the history and the metrics, in this order, once each."""

    def __init__(self, telemetry: Telemetry, store: Store | None, models: PublishedModels) -> None:
        self.history = History()
        self._telemetry = telemetry
        self._store = store
        self._models = models
        for report in store.load() if store else ():
            if not find_fault(report) and not self.history.has(report):
                self._remember(report)

    async def push_round(self, report: RoundReport) -> None:
        if fault := find_fault(report):
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, fault)
        try:
            if not self.history.has(report):
                # The store comes first: what it cannot keep is refused, and may be pushed again.
                if self._store:
                    self._store.append(report)
                self._remember(report)
                await self.history.notify()
        except ConflictError as error:
            raise CallError(grpc.StatusCode.ALREADY_EXISTS, str(error)) from error
        except OSError as error:
            text = f"the store cannot be written: {error}"
            raise CallError(grpc.StatusCode.INTERNAL, text) from error

    def list_runs(self) -> Iterable[RunSummary]:
        return self.history.runs()

    def get_rounds(self, run_id: str, from_round: int) -> Iterable[bytes]:
        try:
            return [entry.wire for entry in self.history.entries(run_id, from_round)]
        except KeyError as error:
            names = ", ".join(run.run_id for run in self.history.runs()) or "none"
            text = f"no run '{run_id}' here; there are: {names}"
            raise CallError(grpc.StatusCode.NOT_FOUND, text) from error

    async def watch_rounds(self, run_id: str, from_round: int) -> AsyncIterator[bytes]:
        try:
            async for entry in self.history.watch(run_id, from_round):
                yield entry.wire
        except ClosedError as error:
            text = "the observer is stopping"
            raise CallError(grpc.StatusCode.UNAVAILABLE, text) from error

    async def get_model(self, run_id: str, server_round: int) -> AsyncIterator[ModelChunk]:
        try:
            async for chunk in self._models.read_chunks(run_id, server_round):
                yield chunk
        except NoModelError as error:
            raise CallError(grpc.StatusCode.NOT_FOUND, str(error)) from error
        except OSError as error:
            text = f"the model cannot be read: {error}"
            raise CallError(grpc.StatusCode.INTERNAL, text) from error

    def _remember(self, report: RoundReport) -> None:
        self.history.add(report)
        self._telemetry.observe(report)


def find_fault(report: RoundReport) -> str:
    """Return why a report cannot be taken; empty where it can."""
    if not report.run_id:
        return "run_id is empty; give the run a name"
    if not report.round:
        return "round is 0; rounds count from 1"
    return ""


async def observe(settings: ObserverSettings, announce: Callable[[Addresses], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: settings of the observer.
        announce: called once, when everything listens.

    Raises:
        OSError: a port is taken, or the store cannot be opened.
        AccessError: the guard names files that cannot be used, or is not one.
    """
    stop = asyncio.Event()
    # On the loop, so that a signal cannot interrupt a write to the store.
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(settings) as addresses:
        announce(addresses)
        await stop.wait()


@asynccontextmanager
async def serving(settings: ObserverSettings) -> AsyncIterator[Addresses]:
    """Run an observer for as long as the context is open, and yield its addresses.

    Raises:
        OSError: a port is taken, or the store cannot be opened.
        AccessError: the guard names files that cannot be used, or is not one.
    """
    settings.guard.check(settings.host)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    with _open_store(settings.store) as store:
        observer = Observer(Telemetry(registry), store, PublishedModels(settings.models))
        # The gRPC port opens last: an observer whose page cannot listen must not have taken a report.
        async with (
            _serve_http(settings, observer.history, registry) as page,
            _serve_grpc(settings, observer) as address,
        ):
            yield Addresses(address, f"{page}/metrics", f"{page}/")


@contextmanager
def _open_store(folder: Path | None) -> Iterator[Store | None]:
    if folder is None:
        yield None
        return
    with Store(folder) as store:
        yield store


@asynccontextmanager
async def _serve_http(settings: ObserverSettings, history: History, registry: CollectorRegistry) -> AsyncIterator[str]:
    app = application(history, registry, page_guards(settings.guard, settings.host))
    async with listen(app, settings.host, settings.metrics_port, settings.guard) as port:
        scheme = "https" if settings.guard.cert else "http"
        yield f"{scheme}://{_join_address(settings.host, port)}"


@asynccontextmanager
async def _serve_grpc(settings: ObserverSettings, observer: Observer) -> AsyncIterator[str]:
    server = aio.server(options=_OPTIONS, interceptors=settings.guard.interceptors())
    add_observer_service(observer, server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((SERVICE, *_STANDARD_SERVICES), server)
    address = _join_address(settings.host, _bind(server, settings))
    await server.start()
    for name in ("", SERVICE):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield address
    finally:
        # Watches first: they would otherwise use up the whole grace period.
        await checks.enter_graceful_shutdown()
        await observer.history.close()
        await server.stop(_GRACE_SECONDS)


def _bind(server: aio.Server, settings: ObserverSettings) -> int:
    address = _join_address(settings.host, settings.port)
    credentials = settings.guard.credentials()
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise OSError(
            f"cannot listen on {address}; another process may have the port, or it is not an address of this machine"
        ) from error


def _join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
