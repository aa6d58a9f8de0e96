"""The Observer service in terms of dataclasses: the calls of a client, and what a server answers.

A server takes and gives reports in their serialised form: reading a large one takes seconds, in which the loop that
serves must not stand still.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc import aio

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import fedbasin_pb2_grpc as rpc
from fedbasin.proto.convert import from_protobuf, to_protobuf
from fedbasin.proto.report import ReportError, RoundReport

RUN_KEY = "fedbasin-run-key"  # the metadata that carries the key of a run
PROCESS_KEY = secrets.token_hex(32)

T = TypeVar("T")

SERVICE: str = pb.DESCRIPTOR.services_by_name["Observer"].full_name


class CallError(Exception):
    """A call that the service refuses.

    Attributes:
        code: gRPC's status code for the caller.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class RunSummary:
    """A run in a list of runs.

    Attributes:
        run_id: Flower's id of the run.
        recipe: name of the recipe in the settings.
        rounds_done: number of the last round that succeeded.
        rounds: number of rounds that the run will have.
        finished: whether the last round has ended.
        problem: why the run ended before its last round; empty where it did not.
        lost: whether its process is gone although the run has not ended.
    """

    run_id: str
    recipe: str = ""
    rounds_done: int = 0
    rounds: int = 0
    finished: bool = False
    problem: str = ""
    lost: bool = False

    @property
    def state(self) -> str:
        """The state of the run: starting, running, finished, failed or lost."""
        if self.lost:
            return "lost"
        if self.problem:
            return "failed"
        if self.finished:
            return "finished"
        return "running" if self.has_reported else "starting"

    @property
    def has_reported(self) -> bool:
        """Whether the observer has a report of the run."""
        return bool(self.rounds_done or self.problem)


@dataclass(frozen=True)
class ModelChunk:
    """A piece of the file of a global model; pieces come in order, without gaps.

    Attributes:
        offset: place of the first byte in the file.
        data: the bytes.
        total_bytes: size of the file.
        round: round of the model.
        sha256: SHA-256 of the whole file; in the last piece alone.
    """

    offset: int
    data: bytes
    total_bytes: int
    round: int
    sha256: bytes = b""


class ReplyStream(Iterator[T]):
    """The replies of a streaming call, each converted as it is read."""

    # A class and not a generator: a generator could not be cancelled before its first item is read.
    def __init__(self, call: Any, convert: Callable[[Any], T]) -> None:
        self._call = call
        self._convert = convert

    def __next__(self) -> T:
        return self._convert(next(self._call))

    def cancel(self) -> None:
        """End the call; reading on raises `grpc.RpcError`."""
        self._call.cancel()


class RemoteObserver:
    """An observer behind a gRPC channel.

    Every call raises `grpc.RpcError` where it fails. An empty `run_id` means the newest run. Timeouts are in seconds.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = rpc.ObserverStub(channel)

    def push_round(self, report: RoundReport, timeout: float | None = None, run_key: str = PROCESS_KEY) -> None:
        """Send a report and wait until the observer has it."""
        self.start_push(report, timeout, run_key).result()

    def start_push(
        self, report: RoundReport, timeout: float | None = None, run_key: str = PROCESS_KEY
    ) -> "grpc.CallFuture[pb.PushReply]":
        """Send a report without waiting; the future's result says that the observer has it.

        Args:
            report: the report.
            timeout: seconds for the call.
            run_key: secret of the run: the observer takes all reports of a run from the holder of one key. Without one,
                this process is the holder.
        """
        return self._stub.PushRound.future(report.to_message(), timeout=timeout, metadata=((RUN_KEY, run_key),))

    def attend(self, run: RunSummary, run_key: str = PROCESS_KEY) -> "grpc.CallFuture[pb.AttendReply]":
        """Say that this process works on a run for as long as the call is open.

        Args:
            run: the run; its id, recipe and number of rounds are told.
            run_key: secret of the run, as in `start_push`.
        """
        return self._stub.Attend.future(to_protobuf(run, pb.RunSummary()), metadata=((RUN_KEY, run_key),))

    def list_runs(self, timeout: float | None = None) -> tuple[RunSummary, ...]:
        """Return the runs in the order in which they began."""
        reply = self._stub.ListRuns(pb.ListRunsRequest(), timeout=timeout)
        return tuple(from_protobuf(RunSummary, run) for run in reply.runs)

    def get_rounds(
        self, run_id: str = "", from_round: int = 0, timeout: float | None = None
    ) -> tuple[RoundReport, ...]:
        """Return the reports of a run so far, by round.

        Raises:
            ReportError: the observer speaks another version.
        """
        reports: list[RoundReport] = []
        request = pb.RoundsRequest(run_id=run_id, from_round=from_round)
        # A reply has as many reports as fit; the next call asks for those after them.
        while messages := self._stub.GetRounds(request, timeout=timeout).reports:
            reports += map(RoundReport.from_message, messages)
            request = pb.RoundsRequest(run_id=reports[-1].run_id, from_round=reports[-1].round + 1)
        return tuple(reports)

    def watch_rounds(
        self, run_id: str = "", from_round: int = 0, timeout: float | None = None
    ) -> ReplyStream[RoundReport]:
        """Return the reports of a run so far and then each as it comes, until the run ends.

        The call starts at once, not with the first report that is read.

        Raises:
            ReportError: the observer speaks another version.
        """
        request = pb.RoundsRequest(run_id=run_id, from_round=from_round)
        call = self._stub.WatchRounds(request, timeout=timeout)
        return ReplyStream(call, RoundReport.from_message)

    def get_model(self, run_id: str, server_round: int = 0, timeout: float | None = None) -> ReplyStream[ModelChunk]:
        """Return the global model of a run in pieces; round 0 stands for whichever is kept."""
        request = pb.ModelRequest(run_id=run_id, round=server_round)
        call = self._stub.GetModel(request, timeout=timeout)
        return ReplyStream(call, partial(from_protobuf, ModelChunk))


class ObserverService(ABC):
    """The answers of an observer; a method that refuses raises `CallError`."""

    @abstractmethod
    async def push_round(self, wire: bytes, run_key: str) -> None:
        """Take a serialised report; an equal one again changes nothing."""

    @abstractmethod
    async def attend(self, run: RunSummary, run_key: str) -> None:
        """Take the caller for the process of a run until the call ends."""

    @abstractmethod
    def list_runs(self) -> Iterable[RunSummary]:
        """Return the runs in the order in which they began."""

    @abstractmethod
    def get_rounds(self, run_id: str, from_round: int) -> Iterable[bytes]:
        """Return serialised reports of a run by round, as many as a reply may have."""

    @abstractmethod
    def watch_rounds(self, run_id: str, from_round: int) -> AsyncIterator[bytes]:
        """Yield the serialised reports of a run, past and to come."""

    @abstractmethod
    def get_model(self, run_id: str, server_round: int) -> AsyncIterator[ModelChunk]:
        """Yield the global model of a run in pieces."""


def add_observer_service(service: ObserverService, server: aio.Server) -> None:
    """Let a gRPC server answer the calls of the Observer service."""
    servicer = _Servicer(service)
    # Not by the generated function: reports pass through as bytes.
    handlers = {
        "PushRound": grpc.unary_unary_rpc_method_handler(
            servicer.push_round, response_serializer=pb.PushReply.SerializeToString
        ),
        "Attend": grpc.unary_unary_rpc_method_handler(
            servicer.attend, pb.RunSummary.FromString, pb.AttendReply.SerializeToString
        ),
        "ListRuns": grpc.unary_unary_rpc_method_handler(
            servicer.list_runs, pb.ListRunsRequest.FromString, pb.ListRunsReply.SerializeToString
        ),
        "GetRounds": grpc.unary_unary_rpc_method_handler(servicer.get_rounds, pb.RoundsRequest.FromString),
        "WatchRounds": grpc.unary_stream_rpc_method_handler(servicer.watch_rounds, pb.RoundsRequest.FromString),
        "GetModel": grpc.unary_stream_rpc_method_handler(
            servicer.get_model, pb.ModelRequest.FromString, pb.ModelChunk.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class _Servicer:
    """The adapter from gRPC's messages to a service of dataclasses."""

    def __init__(self, service: ObserverService) -> None:
        self._service = service

    async def push_round(self, request: bytes, context: aio.ServicerContext) -> pb.PushReply:
        async with _aborting(context):
            await self._service.push_round(request, _run_key(context))
        return pb.PushReply()

    async def attend(self, request: pb.RunSummary, context: aio.ServicerContext) -> pb.AttendReply:
        async with _aborting(context):
            await self._service.attend(from_protobuf(RunSummary, request), _run_key(context))
        return pb.AttendReply()

    async def list_runs(self, request: pb.ListRunsRequest, context: aio.ServicerContext) -> pb.ListRunsReply:
        del request, context
        runs = self._service.list_runs()
        return pb.ListRunsReply(runs=[to_protobuf(run, pb.RunSummary()) for run in runs])

    async def get_rounds(self, request: pb.RoundsRequest, context: aio.ServicerContext) -> bytes:
        async with _aborting(context):
            return b"".join(map(_reply_entry, self._service.get_rounds(request.run_id, request.from_round)))

    async def watch_rounds(self, request: pb.RoundsRequest, context: aio.ServicerContext) -> AsyncIterator[bytes]:
        async with _aborting(context):
            async for wire in self._service.watch_rounds(request.run_id, request.from_round):
                yield wire

    async def get_model(self, request: pb.ModelRequest, context: aio.ServicerContext) -> AsyncIterator[pb.ModelChunk]:
        async with _aborting(context):
            async for chunk in self._service.get_model(request.run_id, request.round):
                yield to_protobuf(chunk, pb.ModelChunk())


def _run_key(context: aio.ServicerContext) -> str:
    return str(dict(context.invocation_metadata()).get(RUN_KEY, ""))


def _reply_entry(wire: bytes) -> bytes:
    """Return a serialised report as a serialised `RoundsReply` of this one report."""
    # Serialised messages one after the other are the message with the entries of all. The length is a varint, with
    # seven bits in each byte.
    length, size = len(wire), bytearray()
    while length > 0x7F:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([_REPORTS_TAG, *size, length]) + wire


_REPORTS_TAG = pb.RoundsReply(reports=[pb.RoundReport()]).SerializeToString()[0]


@asynccontextmanager
async def _aborting(context: aio.ServicerContext) -> AsyncIterator[None]:
    """End the call with the status code of a refusal."""
    try:
        yield
    except ReportError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except CallError as error:
        await context.abort(error.code, str(error))
