"""The runs of a history as the page shows them: summaries are made once, reports are read when they are needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from anyio import CapacityLimiter, to_thread

from fedbasin.proto.report import RoundReport
from fedbasin.server.observe.history import Entry, History
from fedbasin.server.report.reported_run import ReportedRun
from fedbasin.server.report.summary import RoundSummary, summarise

_CACHED_RUNS = 8


@dataclass(frozen=True)
class UnreadReports(Sequence[RoundReport]):
    """Reports that are parsed anew each time: all of them at once would take much memory."""

    entries: Sequence[Entry]

    @overload
    def __getitem__(self, place: int) -> RoundReport: ...
    @overload
    def __getitem__(self, place: slice) -> "UnreadReports": ...
    def __getitem__(self, place: int | slice) -> "RoundReport | UnreadReports":
        if isinstance(place, slice):
            return UnreadReports(self.entries[place])
        return self.entries[place].report

    def __len__(self) -> int:
        return len(self.entries)


class RunReader:
    """A reader of a history, on the loop on which the history lives."""

    def __init__(self, history: History) -> None:
        self._history = history
        # Summaries by run and number of the entry; the run that was shown longest ago comes first.
        self._summaries: dict[str, Mapping[int, RoundSummary]] = {}
        self._thread = CapacityLimiter(1)

    async def read_run(self, run_id: str) -> ReportedRun:
        """Return a run; an empty id means the newest.

        Raises:
            KeyError: there is no such run.
        """
        entries = self._history.entries(run_id)
        if not entries:
            raise KeyError(run_id)
        cached = self._summaries.pop(run_id, {})
        # On a thread: parsing and summarising a long run would hold up the pushes on the loop.
        summaries = await to_thread.run_sync(_summarise, entries, cached, limiter=self._thread)
        self._summaries[run_id] = summaries
        while len(self._summaries) > _CACHED_RUNS:
            del self._summaries[next(iter(self._summaries))]
        ordered = sorted(entries, key=lambda entry: entry.round)
        lost = self._history.state(ordered[0].run.run_id) == "lost"
        return ReportedRun(UnreadReports(ordered), [summaries[entry.number] for entry in ordered], lost)


def _summarise(entries: Sequence[Entry], cached: Mapping[int, RoundSummary]) -> Mapping[int, RoundSummary]:
    return {entry.number: cached.get(entry.number) or summarise(entry.report) for entry in entries}
