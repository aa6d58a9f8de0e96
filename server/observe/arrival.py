"""Pushed reports, read: the small ones on a thread, the large ones in another process.

To read the report of thousands of clients takes seconds of Python. A thread would take them from the loop, which waits
for the interpreter at every message that it sends to a reader.
"""

import asyncio
import json
import os
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from anyio import CapacityLimiter, to_thread

from fedbasin.proto.observer_service import RunSummary
from fedbasin.proto.report import RoundReport
from fedbasin.server.observe.metrics.round_contribution import RoundContribution, tally
from fedbasin.server.report.summary import summarise, summary_to_json

_SMALL_BYTES = 2**17


class ReaderError(RuntimeError):
    """A report that could not be read because the process that read it ended."""


@dataclass(frozen=True)
class Arrival:
    """A report as the log and the metrics take it.

    Attributes:
        run: the run as this report describes it; `rounds_done` is 0 where the round failed.
        round: number of the round.
        wire: the report in its one serialised form.
        brief: the round in brief, as JSON.
        tally: what it adds to the metrics.
    """

    run: RunSummary
    round: int
    wire: bytes
    brief: str
    tally: RoundContribution


def read_arrival(data: bytes) -> Arrival:
    """Read a serialised report.

    Raises:
        ReportError: it is not a report of this version.
    """
    wire = RoundReport.normalise(data)
    return digest(RoundReport.from_bytes(wire), wire)


def digest(report: RoundReport, wire: bytes) -> Arrival:
    """Return a report, and its serialised form, as the log and the metrics take it."""
    done = 0 if report.problem else report.round
    run = RunSummary(report.run_id, report.recipe, done, report.rounds, report.last, report.problem)
    brief = json.dumps(summary_to_json(summarise(report)), allow_nan=False)
    return Arrival(run, report.round, wire, brief, tally(report))


class ArrivalReader:
    """A reader of pushed reports; it starts its process with the first large one."""

    def __init__(self) -> None:
        self._thread = CapacityLimiter(1)
        self._process = _start_process()

    async def read(self, data: bytes) -> Arrival:
        """Read a serialised report.

        Raises:
            ReportError: it is not a report of this version.
            ReaderError: the process that read it ended, as where memory is short.
        """
        if len(data) <= _SMALL_BYTES:
            return await to_thread.run_sync(read_arrival, data, limiter=self._thread)
        process = self._process
        try:
            return await asyncio.get_running_loop().run_in_executor(process, read_arrival, data)
        except BrokenExecutor as error:
            if self._process is process:
                self._process = _start_process()
            raise ReaderError(f"the process that read a report of {len(data)} bytes ended: {error}") from error

    def close(self) -> None:
        """End the process."""
        self._process.shutdown(cancel_futures=True)


def _start_process() -> ProcessPoolExecutor:
    # Spawned, because a fork would copy the ports and the threads of gRPC; and at a lower priority than the loop.
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_give_way)


def _give_way() -> None:
    if hasattr(os, "nice"):
        os.nice(5)
