"""The process that outlives the runs: ServerApps push round reports, anyone reads, watches or scrapes them.

A ServerApp ends with its run, and a metrics endpoint inside it would too. This process stays, behind the service
`Observer` of fedbasin.proto, the standard gRPC services for health and reflection, a page for people and one for
Prometheus. One loop serves all of them, so whatever takes long is done on a thread.
"""

import asyncio
import hashlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, ProcessCollector

from fedbasin.proto.observer_service import (
    RUN_KEY,
    SERVICE,
    CallError,
    ModelChunk,
    ObserverService,
    RunSummary,
    add_observer_service,
)
from fedbasin.server.observe.access import Guard
from fedbasin.server.observe.arrival import Arrival, ArrivalReader, ReaderError, digest
from fedbasin.server.observe.connections import count_connections
from fedbasin.server.observe.history import ClosedError, ConflictError, FullError, History, HolderError, Limits
from fedbasin.server.observe.metrics.telemetry import Telemetry
from fedbasin.server.observe.published_models import BusyError, NoModelError, PublishedModels
from fedbasin.server.observe.push import LARGEST_REPORT_BYTES
from fedbasin.server.observe.store import Store
from fedbasin.server.page.app import application
from fedbasin.server.page.listen import listen
from fedbasin.server.page.page_access import page_guards

_STANDARD_SERVICES = (health.SERVICE_NAME, reflection.SERVICE_NAME)
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # or a second observer would quietly take half of the calls
    ("grpc.max_receive_message_length", LARGEST_REPORT_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 15_000),  # finds runs and watchers whose machine is gone, after 20 s more
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),
    ("grpc.max_concurrent_streams", 128),
)
_OTHER_CALLS = 64  # calls at once beside watches
_GRACE_SECONDS = 0.5  # for pushes under way, and for watchers to learn that the observer stops
_SWITCH_SECONDS = 0.0001  # each send of the loop waits so long for a busy thread; Python's 5 ms add up over readers
_REPLY_BYTES = 4 * 2**20  # of reports in one reply
_LONGEST_WORD = 200
_LAST_ROUND = 10**9
_SHORTEST_KEY = 16
_LATE_SECONDS = 0.1  # after the moment at which a run is lost
_NAMED = 20  # runs in an error


@dataclass(frozen=True)
class ObserverSettings:
    """The settings of an observer; port 0 means a free one.

    Attributes:
        host: address of the gRPC service.
        port: port of the gRPC service.
        metrics_port: port of the page and of /metrics.
        metrics_host: address of the page and of /metrics; empty where it is that of the gRPC service.
        store: folder for the reports; None keeps them in memory only.
        models: folder with run folders, whose global models may be downloaded; None publishes none.
        guard: proof that both ports require of their callers.
        allowed_hosts: names under which browsers and scrapers may reach the page, beside those of this machine.
        limits: bounds of what is kept and of who reads it.
    """

    host: str = "127.0.0.1"
    port: int = 9470
    metrics_port: int = 9471
    metrics_host: str = ""
    store: Path | None = None
    models: Path | None = None
    guard: Guard = field(default_factory=Guard)
    allowed_hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)

    @property
    def page_host(self) -> str:
        """The address of the page and of /metrics."""
        return self.metrics_host or self.host


@dataclass(frozen=True)
class Addresses:
    """The addresses at which an observer listens."""

    observer: str
    metrics: str
    page: str


class Observer(ObserverService):
    """The service: pushes go to the store, the history and the metrics, in this order, once each."""

    def __init__(self, telemetry: Telemetry, store: Store | None, models: PublishedModels, limits: Limits) -> None:
        self.history = History(limits)
        self._absent_seconds = limits.absent_seconds
        self._telemetry = telemetry
        self._store = store
        self._models = models
        self._taking: set[asyncio.Task[None]] = set()
        self._in_turn = asyncio.Lock()
        self._reader = ArrivalReader()

    def load(self) -> None:
        """Take the reports that are in the store."""
        if self._store is None:
            return
        forgotten: list[tuple[str, int]] = []
        for stored in self._store.load():
            arrival = digest(stored.report, stored.report.to_bytes())
            if not find_fault(arrival):
                forgotten += self.history.add(arrival, stored.holder)
                self._telemetry.add(arrival.tally)
        self._store.forget(forgotten)
        self.history.expect_processes()

    async def push_round(self, wire: bytes, run_key: str) -> None:
        holder = _holder(run_key)
        # A task of its own: a caller that gives up must not stop halfway between the store and the metrics.
        task = asyncio.create_task(self._take(wire, holder))
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)
        await asyncio.shield(task)

    async def finish(self) -> None:
        """Wait for the pushes that are under way."""
        await asyncio.gather(*self._taking, return_exceptions=True)
        await asyncio.to_thread(self._reader.close)

    async def attend(self, run: RunSummary, run_key: str) -> None:
        holder = _holder(run_key)
        if fault := _find_name_fault(run):
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, fault)
        try:
            self.history.check_holder(run.run_id, holder)
            with self.history.watching(), self.history.attending(run, holder):
                self._tell_state(run.run_id)
                try:
                    await self.history.wait_until_closed()
                finally:
                    self.tell_later(run.run_id)
        except (ClosedError, FullError, HolderError) as error:
            raise CallError(_CODES[type(error)], str(error)) from error

    def tell_later(self, *run_ids: str) -> None:
        """Tell the metrics of runs that are lost when their processes have had time to come back."""
        loop = asyncio.get_running_loop()
        for run_id in run_ids:
            loop.call_later(self._absent_seconds + _LATE_SECONDS, self._tell_state, run_id)

    def _tell_state(self, run_id: str) -> None:
        runs = {run.run_id: run for run in self.history.runs()}
        run = runs.get(run_id)
        # Runs of one recipe share their gauges, which show the newest.
        if run and run is [other for other in runs.values() if other.recipe == run.recipe][-1]:
            self._telemetry.set_state(run.recipe, run.state)

    def list_runs(self) -> Iterable[RunSummary]:
        return self.history.runs()

    def get_rounds(self, run_id: str, from_round: int) -> Iterable[bytes]:
        try:
            entries = sorted(self.history.entries(run_id, from_round), key=lambda entry: entry.round)
        except KeyError as error:
            names = ", ".join(run.run_id for run in self.history.runs()[-_NAMED:]) or "none"
            text = f"no run '{run_id}' here; there are: {names}"
            raise CallError(grpc.StatusCode.NOT_FOUND, text) from error
        sizes = accumulate(len(entry.wire) for entry in entries)
        fitting = sum(size <= _REPLY_BYTES for size in sizes)
        # One in any case, or a reader would never get beyond a large one.
        return [entry.wire for entry in entries[: max(fitting, 1)]]

    async def watch_rounds(self, run_id: str, from_round: int) -> AsyncIterator[bytes]:
        try:
            with self.history.watching():
                async for entry in self.history.watch(run_id, from_round):
                    yield entry.wire
        except FullError as error:
            raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from error
        except ClosedError as error:
            raise CallError(_CODES[ClosedError], str(error)) from error

    async def get_model(self, run_id: str, server_round: int) -> AsyncIterator[ModelChunk]:
        try:
            async with aclosing(self._models.read_chunks(run_id, server_round)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except NoModelError as error:
            raise CallError(grpc.StatusCode.NOT_FOUND, str(error)) from error
        except BusyError as error:
            raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from error
        except OSError as error:
            text = f"the model cannot be read: {error}"
            raise CallError(grpc.StatusCode.INTERNAL, text) from error

    async def _take(self, wire: bytes, holder: bytes) -> None:
        try:
            arrival = await self._reader.read(wire)
            if fault := find_fault(arrival):
                raise CallError(grpc.StatusCode.INVALID_ARGUMENT, fault)
            async with self._in_turn:
                if self.history.has(arrival, holder):
                    return
                # The store comes first: what it cannot keep is refused, and may be pushed again.
                if self._store:
                    await asyncio.to_thread(self._store.append, arrival, holder)
                forgotten = self.history.add(arrival, holder)
                if self._store and forgotten:
                    await asyncio.to_thread(self._store.forget, forgotten)
                await asyncio.to_thread(self._telemetry.add, arrival.tally)
        except (ConflictError, FullError, HolderError, ReaderError) as error:
            raise CallError(_CODES[type(error)], str(error)) from error
        except OSError as error:
            text = f"the store cannot be written: {error}"
            raise CallError(grpc.StatusCode.INTERNAL, text) from error
        await self.history.notify()


_CODES = {
    ClosedError: grpc.StatusCode.UNAVAILABLE,
    ConflictError: grpc.StatusCode.ALREADY_EXISTS,
    FullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HolderError: grpc.StatusCode.PERMISSION_DENIED,
    ReaderError: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def find_fault(arrival: Arrival) -> str:
    """Return why a report cannot be taken; empty where it can."""
    if fault := _find_name_fault(arrival.run):
        return fault
    if not 0 < arrival.round <= _LAST_ROUND:
        return f"round is {arrival.round}; rounds count from 1, and {_LAST_ROUND} is the last"
    return ""


def _find_name_fault(run: RunSummary) -> str:
    if not run.run_id:
        return "run_id is empty; give the run a name"
    for name, word in (("run_id", run.run_id), ("recipe", run.recipe)):
        if len(word) > _LONGEST_WORD:
            return f"{name} has more than {_LONGEST_WORD} characters; give a shorter one"
    return ""


def _holder(run_key: str) -> bytes:
    if len(run_key) < _SHORTEST_KEY:
        raise CallError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"a report needs the key of its run: metadata `{RUN_KEY}` with a secret of at least {_SHORTEST_KEY} "
            "characters, the same for all rounds of the run",
        )
    return hashlib.sha256(run_key.encode()).digest()


async def observe(settings: ObserverSettings, announce: Callable[[Addresses], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: settings of the observer.
        announce: called once, when everything listens.

    Raises:
        OSError: a port is taken, or the store cannot be opened.
        AccessError: the guard names files that cannot be used, or is not one.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
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
    for host in {settings.host, settings.page_host}:
        settings.guard.check(host)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    with _open_store(settings.store) as store:
        observer = Observer(Telemetry(registry), store, PublishedModels(settings.models), settings.limits)
        await asyncio.to_thread(observer.load)
        observer.tell_later(*(run.run_id for run in observer.history.runs()))
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
    app = application(history, registry, page_guards(settings.guard, settings.page_host, settings.allowed_hosts))
    async with listen(app, settings.page_host, settings.metrics_port, settings.guard) as port:
        scheme = "https" if settings.guard.cert else "http"
        yield f"{scheme}://{_join_address(settings.page_host, port)}"


@asynccontextmanager
async def _serve_grpc(settings: ObserverSettings, observer: Observer) -> AsyncIterator[str]:
    server = aio.server(
        options=(*_OPTIONS, ("grpc.max_allowed_incoming_connections", count_connections())),
        interceptors=settings.guard.interceptors(),
        maximum_concurrent_rpcs=settings.limits.watchers + _OTHER_CALLS,
    )
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
        await observer.finish()


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
