"""The rounds an observer remembers: one shared log that any number of watchers read at their own pace.

Nothing is queued for a watcher. It keeps the number of the last report that it has seen and asks the log for
what came after, so one that is slow or dead costs nothing and holds up nobody. The log runs on one asyncio loop and
needs no lock.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from itertools import count, takewhile

from fedbasin.proto.observer_service import RunSummary
from fedbasin.proto.report import RoundReport


class ConflictError(ValueError):
    """A second, different report for a round that is already known."""


class ClosedError(RuntimeError):
    """A log that will not grow any more, while a watcher was waiting for it."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a history; the oldest round of the run that has been silent for longest goes first.

    Attributes:
        runs: largest number of runs.
        rounds: largest number of rounds of one run; beyond it, the run loses its oldest.
        wire_bytes: largest number of bytes of all reports.
    """

    runs: int = 100
    rounds: int = 2000
    wire_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class Entry:
    """A report in the log.

    Attributes:
        number: place in the whole log, from 0.
        round: number of the round.
        run: the run as this report describes it; `rounds_done` is 0 where the round failed.
        wire: the serialised report. Reports are kept so because as objects they take many times the memory.
    """

    number: int
    round: int
    run: RunSummary
    wire: bytes

    @property
    def report(self) -> RoundReport:
        """The report, parsed anew each time."""
        return RoundReport.from_bytes(self.wire)


@dataclass(frozen=True)
class RecordedRun:
    """The reports of one run.

    Attributes:
        start: number of the run's first report in the log.
        entries: the run's reports by round, in order of arrival.
    """

    start: int
    entries: dict[int, Entry] = field(default_factory=dict)

    @property
    def newest(self) -> Entry:
        """The report that arrived last."""
        return next(reversed(self.entries.values()))

    def entries_after(self, number: int) -> list[Entry]:
        """Return the reports that arrived after that number, in order."""
        # From the end: a watcher usually lacks one report of thousands.
        newer = takewhile(lambda entry: entry.number > number, reversed(self.entries.values()))
        return list(newer)[::-1]

    def summary(self) -> RunSummary:
        """Return the run as its newest report describes it."""
        done = max(entry.run.rounds_done for entry in self.entries.values())
        return replace(self.newest.run, rounds_done=done)


class History:
    """The reports that were pushed, within limits, and a signal for those who wait for more."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._runs: dict[str, RecordedRun] = {}  # the longest silent first
        self._numbers = count()
        self._changed = asyncio.Condition()
        self._wire_bytes = 0
        self._closed = False

    def has(self, report: RoundReport) -> bool:
        """Return whether an equal report is in the log.

        Raises:
            ConflictError: the log has another report for that round.
        """
        run = self._runs.get(report.run_id)
        entry = run.entries.get(report.round) if run else None
        # By bytes: two reports with a NaN metric would never be equal.
        if entry and entry.wire != report.to_bytes():
            raise ConflictError(
                f"run_id '{report.run_id}' has another report for round {report.round} already, and the "
                "first one counts; give every run an id of its own"
            )
        return entry is not None

    def add(self, report: RoundReport) -> None:
        """Append a report that is new; `notify` then wakes the watchers."""
        number = next(self._numbers)
        # Taken out and put back at the end, so that the runs stay ordered by their last report.
        run = self._runs.pop(report.run_id, None) or RecordedRun(number)
        self._runs[report.run_id] = run
        entry = Entry(number, report.round, _summarise(report), report.to_bytes())
        run.entries[report.round] = entry
        self._wire_bytes += len(entry.wire)
        if len(run.entries) > self._limits.rounds:
            self._forget(report.run_id)
        while self._wire_bytes > self._limits.wire_bytes or len(self._runs) > self._limits.runs:
            self._forget(next(iter(self._runs)))

    async def notify(self) -> None:
        """Wake the watchers."""
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        """End every watch with `ClosedError`."""
        self._closed = True
        await self.notify()

    def runs(self) -> list[RunSummary]:
        """Return the runs in the order in which they began."""
        return [run.summary() for run in sorted(self._runs.values(), key=lambda run: run.start)]

    def entries(self, run_id: str, from_round: int = 0) -> list[Entry]:
        """Return the reports of a run; an empty id means the newest run, if there is any.

        Raises:
            KeyError: there is no run of that name.
        """
        if run_id and run_id not in self._runs:
            raise KeyError(run_id)
        return [entry for entry in self._entries_after(run_id, -1) if entry.round >= from_round]

    async def watch(self, run_id: str, from_round: int = 0) -> AsyncGenerator[Entry, None]:
        """Yield the reports so far and then each as it comes, until the run's last or the one that ended it.

        A run that has not reported yet is waited for; an empty id means the newest run, or the first to come.

        Raises:
            ClosedError: the log was closed before the run's end.
        """
        seen = -1
        while True:
            entries = await self._wait_for_more(run_id, seen)
            newest = entries[-1]
            # From the first report on, an empty id means that run, even if a newer one begins.
            # Numbers and not positions say what was seen: the log forgets reports while a watcher waits.
            run_id = newest.run.run_id
            seen = newest.number
            for entry in entries:
                if entry.round >= from_round:
                    yield entry
            if newest.run.finished or newest.run.problem:
                return

    async def _wait_for_more(self, run_id: str, seen: int) -> list[Entry]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or bool(self._entries_after(run_id, seen)))
        if self._closed:
            raise ClosedError
        return self._entries_after(run_id, seen)

    def _entries_after(self, run_id: str, number: int) -> list[Entry]:
        run = self._runs.get(run_id) if run_id else self._newest_run()
        return run.entries_after(number) if run else []

    def _newest_run(self) -> RecordedRun | None:
        return max(self._runs.values(), key=lambda run: run.start, default=None)

    def _forget(self, run_id: str) -> None:
        entries = self._runs[run_id].entries
        entry = entries.pop(next(iter(entries)))
        self._wire_bytes -= len(entry.wire)
        if not entries:
            del self._runs[run_id]


def _summarise(report: RoundReport) -> RunSummary:
    return RunSummary(
        report.run_id, report.recipe, 0 if report.problem else report.round, report.rounds, report.last, report.problem
    )
