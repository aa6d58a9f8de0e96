"""The process that outlives the runs: ServerApps push round reports, anyone reads, watches or scrapes them.

A ServerApp ends with its run, and a metrics endpoint inside it would too. This one stays, behind the service
`Observer` of fedbasin.proto, the standard gRPC services for health and reflection, a page for people and one for
Prometheus.
Without a guard it has no login: whoever reaches its ports can read and push.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, ProcessCollector

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import fedbasin_pb2_grpc as rpc
from fedbasin.server.observe.access import Guard
from fedbasin.server.observe.history import ClosedError, ConflictError, History
from fedbasin.server.observe.published_models import Models, NoModelError
from fedbasin.server.observe.push import LARGEST_REPORT_BYTES
from fedbasin.server.observe.store import Store
from fedbasin.server.observe.telemetry import Telemetry
from fedbasin.server.page.app import application
from fedbasin.server.page.listen import listening
from fedbasin.server.page.page_access import guards

SERVICE = "fedbasin.v1.Observer"
_STANDARD_SERVICES = (health.SERVICE_NAME, reflection.SERVICE_NAME)
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # or a second observer would quietly take half of the calls
    ("grpc.max_receive_message_length", LARGEST_REPORT_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 60_000),  # finds watchers whose machine is gone
)
_GRACE_SECONDS = 0.5  # for pushes under way, and for watchers to take in that it is over


@dataclass(frozen=True)
class Settings:
    """Where to listen and what to keep; port 0 means a free one.

    Attributes:
        host: address of both ports.
        port: of the gRPC service.
        metrics_port: of the page and of /metrics.
        store: folder for the reports; None keeps them in memory only.
        models: folder with run folders, whose global models may be downloaded; None hands out none.
        guard: what both ports ask of their callers.
    """

    host: str = "127.0.0.1"
    port: int = 9470
    metrics_port: int = 9471
    store: Path | None = None
    models: Path | None = None
    guard: Guard = field(default_factory=Guard)


@dataclass(frozen=True)
class Addresses:
    """Where an observer listens."""

    observer: str
    metrics: str
    page: str


class Observer(rpc.ObserverServicer):
    """The service: pushes go to the store, the history and the metrics, in this order, once each."""

    def __init__(self, telemetry: Telemetry, store: Store | None, models: Models) -> None:
        self.history = History()
        self._telemetry = telemetry
        self._store = store
        self._models = models
        for report in store.load() if store else ():
            if not refusal(report) and not self.history.knows(report):
                self._remember(report)

    async def PushRound(  # noqa: N802 - the name in the .proto
        self, request: pb.RoundReport, context: aio.ServicerContext
    ) -> pb.PushReply:
        """Takes a report; the same one again changes nothing."""
        if reason := refusal(request):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
        try:
            if not self.history.knows(request):
                if self._store:
                    self._store.append(request)
                self._remember(request)
                await self.history.tell()
        except ConflictError as error:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error))
        except OSError as error:
            await context.abort(grpc.StatusCode.INTERNAL, f"the store cannot be written: {error}")
        return pb.PushReply()

    async def ListRuns(  # noqa: N802 - the name in the .proto
        self, request: pb.ListRunsRequest, context: aio.ServicerContext
    ) -> pb.ListRunsReply:
        """Lists the runs, in the order in which they began."""
        del request, context
        return pb.ListRunsReply(runs=self.history.runs())

    async def GetRounds(  # noqa: N802 - the name in the .proto
        self, request: pb.RoundsRequest, context: aio.ServicerContext
    ) -> pb.RoundsReply:
        """Gives the rounds of a run so far."""
        try:
            reports = self.history.rounds(request.run_id, request.from_round)
        except KeyError:
            known = ", ".join(run.run_id for run in self.history.runs()) or "none"
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no run '{request.run_id}' here; there are: {known}"
            )
        return pb.RoundsReply(reports=reports)

    async def WatchRounds(  # noqa: N802 - the name in the .proto
        self, request: pb.RoundsRequest, context: aio.ServicerContext
    ) -> AsyncIterator[pb.RoundReport]:
        """Streams the rounds of a run, past and to come."""
        try:
            async for report in self.history.watch(request.run_id, request.from_round):
                yield report
        except ClosedError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the observer is stopping")

    async def GetModel(  # noqa: N802 - the name in the .proto
        self, request: pb.ModelRequest, context: aio.ServicerContext
    ) -> AsyncIterator[pb.ModelChunk]:
        """Streams the global model of a run."""
        try:
            async for chunk in self._models.read(request.run_id, request.round):
                yield chunk
        except NoModelError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except OSError as error:
            await context.abort(grpc.StatusCode.INTERNAL, f"the model cannot be read: {error}")

    async def close(self) -> None:
        """Ends every watch."""
        await self.history.close()

    def _remember(self, report: pb.RoundReport) -> None:
        self.history.add(report)
        self._telemetry.observe(report)


def refusal(report: pb.RoundReport) -> str:
    """Why a report cannot be taken; empty where it can."""
    if report.schema_version != pb.SCHEMA_VERSION:
        return (
            f"schema_version is {report.schema_version} and this observer speaks {pb.SCHEMA_VERSION}; "
            "install the same fedbasin on both sides"
        )
    if not report.run_id:
        return "run_id is empty; give the run a name"
    if not report.round:
        return "round is 0; rounds count from 1"
    try:
        report.finished.ToJsonString()
    except ValueError as error:
        return f"finished is no time: {error}"
    return ""


async def observe(settings: Settings, announce: Callable[[Addresses], None]) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        settings: where to listen and what to keep.
        announce: called once, when everything listens.

    Raises:
        OSError: a port is taken, or the store cannot be opened.
        AccessError: the guard has files that cannot be used, or is none.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(settings) as addresses:
        announce(addresses)
        await stop.wait()


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Addresses]:
    """An observer that listens as long as the context is open.

    Raises:
        OSError: a port is taken, or the store cannot be opened.
        AccessError: the guard has files that cannot be used, or is none.
    """
    settings.guard.check(settings.host)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    with _opened(settings.store) as store:
        observer = Observer(Telemetry(registry), store, Models(settings.models))
        async with (
            _http(settings, observer.history, registry) as page,
            _service(settings, observer) as address,
        ):
            yield Addresses(address, f"{page}/metrics", f"{page}/")


@contextmanager
def _opened(folder: Path | None) -> Iterator[Store | None]:
    if folder is None:
        yield None
        return
    with Store(folder) as store:
        yield store


@asynccontextmanager
async def _http(
    settings: Settings, history: History, registry: CollectorRegistry
) -> AsyncIterator[str]:
    app = application(history, registry, guards(settings.guard, settings.host))
    async with listening(app, settings.host, settings.metrics_port, settings.guard) as port:
        scheme = "https" if settings.guard.cert else "http"
        yield f"{scheme}://{_joined(settings.host, port)}"


@asynccontextmanager
async def _service(settings: Settings, observer: Observer) -> AsyncIterator[str]:
    server = aio.server(options=_OPTIONS, interceptors=settings.guard.interceptors())
    rpc.add_ObserverServicer_to_server(observer, server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((SERVICE, *_STANDARD_SERVICES), server)
    address = _joined(settings.host, _bound(server, settings))
    await server.start()
    for name in ("", SERVICE):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield address
    finally:
        await checks.enter_graceful_shutdown()
        await observer.close()
        await server.stop(_GRACE_SECONDS)


def _bound(server: aio.Server, settings: Settings) -> int:
    address = _joined(settings.host, settings.port)
    credentials = settings.guard.credentials()
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}; it may be taken, or not be ours") from error


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
