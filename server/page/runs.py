"""The runs of a history as the page shows them: summaries are made once, reports are read when they are needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from starlette.concurrency import run_in_threadpool

from fedbasin.proto.fedbasin_pb2 import RoundReport
from fedbasin.server.observe.history import Entry, History
from fedbasin.server.report.reported_run import Run
from fedbasin.server.report.summary import Round, summarise

_KEPT = 8  # runs whose summaries are remembered


@dataclass(frozen=True)
class Unread(Sequence[RoundReport]):
    """Reports that are parsed anew each time: all of them at once would take much memory."""

    entries: Sequence[Entry]

    @overload
    def __getitem__(self, place: int) -> RoundReport: ...
    @overload
    def __getitem__(self, place: slice) -> "Unread": ...
    def __getitem__(self, place: int | slice) -> "RoundReport | Unread":
        if isinstance(place, slice):
            return Unread(self.entries[place])
        return self.entries[place].report

    def __len__(self) -> int:
        return len(self.entries)


class Runs:
    """Reads a history, on the loop that it lives on."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._known: dict[str, Mapping[int, Round]] = {}  # by entry; the longest unasked run first

    async def get(self, run_id: str) -> Run:
        """A run; an empty id means the newest.

        Raises:
            KeyError: there is no such run.
        """
        entries = self._history.entries(run_id)
        if not entries:
            raise KeyError(run_id)
        known = await run_in_threadpool(_summaries, entries, self._known.pop(run_id, {}))
        self._known[run_id] = known
        while len(self._known) > _KEPT:
            del self._known[next(iter(self._known))]
        ordered = sorted(entries, key=lambda entry: known[entry.number].number)
        return Run(Unread(ordered), [known[entry.number] for entry in ordered])


def _summaries(entries: Sequence[Entry], known: Mapping[int, Round]) -> Mapping[int, Round]:
    return {entry.number: known.get(entry.number) or summarise(entry.report) for entry in entries}
