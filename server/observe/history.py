"""The rounds an observer remembers: one shared log that any number of watchers read at their own pace.

Nothing is queued for a watcher. It keeps the number of the last report that it has seen and asks the log for
what came after, so one that is slow or dead costs nothing and holds up nobody. All of it runs on one asyncio
loop. Reports are kept as they came, in bytes: as messages they take five times the memory.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from itertools import count, takewhile

from fedbasin.proto.fedbasin_pb2 import RoundReport, RunSummary


class ConflictError(ValueError):
    """A second, different report for a round that is already known."""


class ClosedError(RuntimeError):
    """The log will not grow any more, and a watcher was waiting for it."""


@dataclass(frozen=True)
class Limits:
    """How much is remembered; the oldest round of the run that has been silent for longest goes first.

    Attributes:
        runs: most runs.
        rounds: most rounds of one run; of more, its own oldest go.
        wire_bytes: most bytes of all reports.
    """

    runs: int = 100
    rounds: int = 2000
    wire_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class Entry:
    """A report in its one serialised form, its number in the whole log, and its round, or 0 where that failed."""

    number: int
    done: int
    wire: bytes

    @property
    def report(self) -> RoundReport:
        """The report, parsed anew."""
        return RoundReport.FromString(self.wire)


@dataclass(frozen=True)
class Run:
    """One run: the number of its first report, and its entries by round, in order of arrival."""

    began: int
    entries: dict[int, Entry] = field(default_factory=dict)

    @property
    def newest(self) -> Entry:
        """The last to arrive."""
        return next(reversed(self.entries.values()))

    def reports(self, after: int = -1) -> list[RoundReport]:
        """The reports that arrived after that number, in order."""
        newer = takewhile(lambda entry: entry.number > after, reversed(self.entries.values()))
        return [entry.report for entry in newer][::-1]

    def summary(self) -> RunSummary:
        """The run in one line, as its newest report has it."""
        report = self.newest.report
        return RunSummary(
            run_id=report.run_id,
            recipe=report.recipe,
            rounds_done=max(entry.done for entry in self.entries.values()),
            rounds=report.rounds,
            finished=report.last,
            problem=report.problem,
        )


class History:
    """What was pushed, within limits, and a signal for those who wait for more."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._runs: dict[str, Run] = {}  # the longest silent first
        self._numbers = count()
        self._changed = asyncio.Condition()
        self._wire_bytes = 0
        self._closed = False

    def knows(self, report: RoundReport) -> bool:
        """Whether this very report is in the log.

        Raises:
            ConflictError: the round is known, with other contents.
        """
        run = self._runs.get(report.run_id)
        known = run.entries.get(report.round) if run else None
        if known and known.wire != _contents(report):
            raise ConflictError(
                f"run_id '{report.run_id}' has another report for round {report.round} already, and the "
                "first one counts; give every run an id of its own"
            )
        return known is not None

    def add(self, report: RoundReport) -> None:
        """Appends a report that is new; watchers hear of it from `tell`."""
        number = next(self._numbers)
        run = self._runs.pop(report.run_id, None) or Run(began=number)
        self._runs[report.run_id] = run
        entry = Entry(number, 0 if report.problem else report.round, _contents(report))
        run.entries[report.round] = entry
        self._wire_bytes += len(entry.wire)
        if len(run.entries) > self._limits.rounds:
            self._forget(report.run_id)
        while self._wire_bytes > self._limits.wire_bytes or len(self._runs) > self._limits.runs:
            self._forget(next(iter(self._runs)))

    async def tell(self) -> None:
        """Wakes the watchers."""
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        """Sends the watchers home."""
        self._closed = True
        await self.tell()

    def runs(self) -> list[RunSummary]:
        """The runs, in the order in which they began."""
        return [run.summary() for run in sorted(self._runs.values(), key=lambda run: run.began)]

    def rounds(self, run_id: str, from_round: int = 0) -> list[RoundReport]:
        """What is remembered of a run; an empty id means the newest run, if there is any.

        Raises:
            KeyError: there is no run of that name.
        """
        if run_id and run_id not in self._runs:
            raise KeyError(run_id)
        return [report for report in self._after(run_id, -1) if report.round >= from_round]

    def entries(self, run_id: str) -> list[Entry]:
        """The same, not parsed yet: for those who read few of them, or on another thread.

        Raises:
            KeyError: there is no run of that name.
        """
        if run_id and run_id not in self._runs:
            raise KeyError(run_id)
        run = self._run(run_id)
        return list(run.entries.values()) if run else []

    async def watch(self, run_id: str, from_round: int = 0) -> AsyncGenerator[RoundReport, None]:
        """The rounds so far and then each as it comes, until the run's last or the one that ended it.

        A run that has not reported yet is waited for; an empty id means the newest run, or the first to come.

        Raises:
            ClosedError: the log was closed before the run's end.
        """
        seen = -1
        while True:
            reports = await self._wait_for_more(run_id, seen)
            run_id = reports[-1].run_id
            seen = self._runs[run_id].newest.number
            for report in reports:
                if report.round >= from_round:
                    yield report
            if reports[-1].last or reports[-1].problem:
                return

    async def _wait_for_more(self, run_id: str, seen: int) -> list[RoundReport]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._last(run_id) > seen)
        if self._closed:
            raise ClosedError
        return self._after(run_id, seen)

    def _after(self, run_id: str, number: int) -> list[RoundReport]:
        run = self._run(run_id)
        return run.reports(number) if run else []

    def _last(self, run_id: str) -> int:
        """The number of a run's newest report; below all numbers where there is none."""
        run = self._run(run_id)
        return run.newest.number if run else -1

    def _run(self, run_id: str) -> Run | None:
        return self._runs.get(run_id) if run_id else self._newest()

    def _forget(self, run_id: str) -> None:
        entries = self._runs[run_id].entries
        entry = entries.pop(next(iter(entries)))
        self._wire_bytes -= len(entry.wire)
        if not entries:
            del self._runs[run_id]

    def _newest(self) -> Run | None:
        return max(self._runs.values(), key=lambda run: run.began, default=None)


def _contents(report: RoundReport) -> bytes:
    """What can be compared: unlike `==`, also where a metric is NaN."""
    return report.SerializeToString(deterministic=True)
