"""The processes of runs: each holds a call open for as long as it lives, so that a run whose process is gone is lost.

An open call needs nothing of its process: a round may take days, and may keep the interpreter busy. A process that is
killed closes its connection at once; of a machine that is gone, pings of the connection tell.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedbasin.proto.observer_service import RunSummary


@dataclass
class AttendedRun:
    """A run that a process works on, or did.

    Attributes:
        run: the run as its process describes it.
        holder: SHA-256 of the key of the run.
        start: number of the run in the order in which runs began.
        calls: number of open calls.
        left: time at which the last call ended, by the monotonic clock.
        grace_seconds: time in which a process may connect again, as after a restart of the observer.
    """

    run: RunSummary
    holder: bytes
    start: int
    calls: int = 0
    left: float = field(default_factory=time.monotonic)
    grace_seconds: float = 0.0

    @property
    def is_lost(self) -> bool:
        """Whether no process has worked on the run for a while."""
        return not self.calls and time.monotonic() - self.left >= self.grace_seconds


class Attendance:
    """The runs that processes work on, or did, as many as there may be; each is lost after a time without one."""

    def __init__(self, most: int, grace_seconds: float) -> None:
        self._most = most
        self._grace_seconds = grace_seconds
        self._runs: dict[str, AttendedRun] = {}

    def __getitem__(self, run_id: str) -> AttendedRun | None:
        return self._runs.get(run_id)

    def __iter__(self) -> Iterator[AttendedRun]:
        return iter(self._runs.values())

    def expect(self, run: RunSummary, holder: bytes, start: int) -> AttendedRun:
        """Return the entry of a run, made where there is none as if its process had left just now."""
        if run.run_id not in self._runs:
            self._make_room()
            self._runs[run.run_id] = AttendedRun(run, holder, start, grace_seconds=self._grace_seconds)
        return self._runs[run.run_id]

    @contextmanager
    def attending(self, run: RunSummary, holder: bytes, start: int) -> Iterator[None]:
        """Count a process of a run for as long as the context is open."""
        entry = self.expect(run, holder, start)
        entry.calls += 1
        try:
            yield
        finally:
            entry.calls -= 1
            entry.left = time.monotonic()

    def forget(self, run_id: str) -> None:
        """Forget a run that nobody works on."""
        entry = self._runs.get(run_id)
        if entry and not entry.calls:
            del self._runs[run_id]

    def _make_room(self) -> None:
        absent = (run_id for run_id, entry in self._runs.items() if not entry.calls)
        if len(self._runs) >= self._most and (longest := next(absent, None)):
            del self._runs[longest]
