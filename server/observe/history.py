"""The rounds an observer remembers: one shared log that any number of watchers read at their own pace.

Nothing is queued for a watcher. It keeps the number of the last report that it has seen and asks the log for
what came after, so one that is slow or dead costs nothing and holds up nobody. The log runs on one asyncio loop and
needs no lock.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from itertools import count, takewhile

from fedbasin.proto.observer_service import RunSummary
from fedbasin.proto.report import RoundReport
from fedbasin.server.observe.arrival import Arrival
from fedbasin.server.observe.attendance import Attendance
from fedbasin.server.observe.connections import count_connections

_MOST_WATCHERS = 512


class ConflictError(ValueError):
    """A second, different report for a round that is already known."""


class HolderError(ValueError):
    """A report of a run that another caller reports on."""


class FullError(RuntimeError):
    """A run or a watcher beyond the limits."""


class ClosedError(RuntimeError):
    """A log that will not grow any more, while a watcher was waiting for it."""

    def __init__(self) -> None:
        super().__init__("the observer is stopping")


@dataclass(frozen=True)
class Limits:
    """Bounds of a history.

    No flood of reports displaces the runs of others: a run makes room for a new one only once it has been silent for a
    while, and the largest run pays for the bytes of all.

    Attributes:
        runs: largest number of runs; beyond it, the one that has been silent for longest goes.
        rounds: largest number of rounds of one run; beyond it, the run loses its oldest.
        wire_bytes: largest number of bytes of all reports; beyond it, the largest run loses its oldest round.
        silent_seconds: time without a report after which a run may go.
        absent_seconds: time without its process after which a run that has not ended is lost.
        watchers: largest number of watches at once; the page and scrapers have as many connections for themselves.
    """

    runs: int = 1000
    rounds: int = 2000
    wire_bytes: int = 256 * 2**20
    silent_seconds: float = 600.0
    absent_seconds: float = 20.0
    watchers: int = field(default_factory=lambda: min(_MOST_WATCHERS, count_connections() // 2))


@dataclass(frozen=True)
class Entry:
    """A report in the log.

    Attributes:
        number: place in the whole log, from 0.
        round: number of the round.
        run: the run as this report describes it; `rounds_done` is 0 where the round failed.
        wire: the serialised report. Reports are kept so because as objects they take many times the memory.
        brief: the round in brief, as JSON: every reader of events is sent it.
    """

    number: int
    round: int
    run: RunSummary
    wire: bytes
    brief: str = ""

    @property
    def report(self) -> RoundReport:
        """The report, parsed anew each time."""
        return RoundReport.from_bytes(self.wire)

    @property
    def size(self) -> int:
        """The bytes that the entry counts for."""
        return len(self.wire) + len(self.brief)


@dataclass
class RecordedRun:
    """The reports of one run.

    Attributes:
        start: number of the run in the order in which runs began.
        holder: SHA-256 of the key that came with the first report.
        entries: the run's reports by round, in order of arrival.
        heard: time of the last report, by the monotonic clock.
        size: bytes of all entries.
    """

    start: int
    holder: bytes
    entries: dict[int, Entry] = field(default_factory=dict)
    heard: float = 0.0
    size: int = 0

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
    """The reports that were pushed, within limits, and a signal for those who wait for more.

    Attributes:
        attendance: the processes of the runs.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self.attendance = Attendance(self._limits.runs, self._limits.absent_seconds)
        self._runs: dict[str, RecordedRun] = {}  # the longest silent first
        self._numbers = count()
        self._changed = asyncio.Condition()
        self._size = 0
        self._watchers = 0
        self._closed = False

    def has(self, arrival: Arrival, holder: bytes) -> bool:
        """Return whether a report is in the log; False where it may be added.

        Args:
            arrival: the report.
            holder: SHA-256 of the key that came with it.

        Raises:
            ConflictError: the log has another report for that round.
            HolderError: the run is reported on by the holder of another key.
            FullError: there are as many runs as there may be, and all have reported lately.
        """
        run_id = arrival.run.run_id
        self.check_holder(run_id, holder)
        run = self._runs.get(run_id)
        if run is None:
            self._check_room(run_id)
            return False
        entry = run.entries.get(arrival.round)
        # By bytes: two reports with a NaN metric would never be equal.
        if entry and entry.wire != arrival.wire:
            raise ConflictError(
                f"run_id '{run_id}' has another report for round {arrival.round} already, and the "
                "first one counts; give every run an id of its own"
            )
        return entry is not None

    def check_holder(self, run_id: str, holder: bytes) -> None:
        """Check that a run is reported on, and worked on, by the holder of this key, or by nobody yet.

        Raises:
            HolderError: it is by the holder of another key.
        """
        known = self._runs.get(run_id) or self.attendance[run_id]
        if known and not compare_digest(known.holder, holder):
            raise HolderError(
                f"run_id '{run_id}' is reported on with another key; only the process that sent its first report, or "
                "one that goes on in the folder of the run, may send more; give every run an id of its own"
            )

    @contextmanager
    def attending(self, run: RunSummary, holder: bytes) -> Iterator[None]:
        """Count a process of a run, of the holder of the run's key, for as long as the context is open."""
        with self.attendance.attending(run, holder, self._begin(run.run_id)):
            yield

    def expect_processes(self) -> None:
        """Expect a process for every run that has not ended."""
        for run in self._runs.values():
            summary = run.summary()
            if not (summary.finished or summary.problem):
                self.attendance.expect(summary, run.holder, run.start)

    def add(self, arrival: Arrival, holder: bytes) -> list[tuple[str, int]]:
        """Append a report that is new; `notify` then wakes the watchers.

        Returns:
            Run and round of the reports that were forgotten for it.
        """
        # Taken out and put back at the end, so that the runs stay ordered by their last report.
        run_id = arrival.run.run_id
        run = self._runs.pop(run_id, None) or RecordedRun(self._begin(run_id), holder)
        self._runs[run_id] = run
        entry = Entry(next(self._numbers), arrival.round, arrival.run, arrival.wire, arrival.brief)
        run.entries[arrival.round] = entry
        run.heard = time.monotonic()
        run.size += entry.size
        self._size += entry.size
        return list(self._make_room(run_id))

    def _check_room(self, run_id: str) -> None:
        oldest = next(iter(self._runs.values()), None)
        if oldest is None or len(self._runs) < self._limits.runs:
            return
        if time.monotonic() - oldest.heard < self._limits.silent_seconds:
            raise FullError(
                f"no room for run_id '{run_id}': {len(self._runs)} runs have reported within "
                f"{self._limits.silent_seconds:g} s, which is as many as this observer keeps; try again later"
            )

    def _make_room(self, newest: str) -> Iterator[tuple[str, int]]:
        """Forget what is beyond the limits, and yield run and round of each report."""
        if len(self._runs[newest].entries) > self._limits.rounds:
            yield self._forget(newest)
        while len(self._runs) > self._limits.runs:
            yield self._forget(next(iter(self._runs)))
        while self._size > self._limits.wire_bytes:
            yield self._forget(max(self._runs, key=lambda run_id: self._runs[run_id].size))

    async def notify(self) -> None:
        """Wake the watchers."""
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        """End every watch with `ClosedError`."""
        self._closed = True
        await self.notify()

    async def wait_until_closed(self) -> None:
        """Wait for `close`.

        Raises:
            ClosedError: always, in the end.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed)
        raise ClosedError

    def runs(self) -> list[RunSummary]:
        """Return the runs in the order in which they began, those without a report among them."""
        runs = {run_id: (run.start, self._describe(run)) for run_id, run in self._runs.items()}
        for attended in self.attendance:
            run = replace(attended.run, lost=attended.is_lost)
            runs.setdefault(run.run_id, (attended.start, run))
        return [run for _, run in sorted(runs.values(), key=lambda pair: pair[0])]

    def state(self, run_id: str) -> str:
        """Return the state of a run; an empty id means the newest, and without any the state is "waiting"."""
        runs = [run for run in self.runs() if run_id in ("", run.run_id)]
        return runs[-1].state if runs else "waiting"

    def entries(self, run_id: str, from_round: int = 0) -> list[Entry]:
        """Return the reports of a run in order of arrival; an empty id means the newest that has any.

        Raises:
            KeyError: there is no run of that name.
        """
        if run_id and run_id not in self._runs and self.attendance[run_id] is None:
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

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count as a watcher for as long as the context is open.

        Raises:
            FullError: there are as many watchers as there may be.
        """
        if self._watchers >= self._limits.watchers:
            raise FullError(f"this observer has {self._watchers} readers, as many as it may have; try again later")
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    async def _wait_for_more(self, run_id: str, seen: int) -> list[Entry]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or bool(self._entries_after(run_id, seen)))
        if self._closed:
            raise ClosedError
        return self._entries_after(run_id, seen)

    def _entries_after(self, run_id: str, number: int) -> list[Entry]:
        run = self._runs.get(run_id) if run_id else self._newest_run()
        return run.entries_after(number) if run else []

    def _begin(self, run_id: str) -> int:
        """Return the place of a run in the order in which runs began."""
        known = self._runs.get(run_id) or self.attendance[run_id]
        return known.start if known else next(self._numbers)

    def _describe(self, run: RecordedRun) -> RunSummary:
        summary = run.summary()
        attended = self.attendance[summary.run_id]
        ended = bool(summary.finished or summary.problem)
        return replace(summary, lost=attended is not None and attended.is_lost and not ended)

    def _newest_run(self) -> RecordedRun | None:
        return max(self._runs.values(), key=lambda run: run.start, default=None)

    def _forget(self, run_id: str) -> tuple[str, int]:
        run = self._runs[run_id]
        entry = run.entries.pop(next(iter(run.entries)))
        run.size -= entry.size
        self._size -= entry.size
        if not run.entries:
            del self._runs[run_id]
            self.attendance.forget(run_id)
        return run_id, entry.round
