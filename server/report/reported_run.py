"""A run to be shown: its rounds in brief, and their reports for the little that needs them."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedbasin.proto.report import RoundReport
from fedbasin.server.report.summary import RoundSummary, summarise


@dataclass(frozen=True)
class ReportedRun:
    """A run with at least one round.

    Attributes:
        reports: reports by round; the sequence may read a report only when it is accessed.
        rounds: summaries of the same reports.
        lost: whether the process of the run is gone although the run has not ended.
    """

    reports: Sequence[RoundReport]
    rounds: Sequence[RoundSummary]
    lost: bool = False

    @classmethod
    def from_reports(cls, reports: Sequence[RoundReport]) -> "ReportedRun":
        """Summarise the reports of a run."""
        return cls(reports, [summarise(report) for report in reports])

    @property
    def name(self) -> str:
        """The id of the run."""
        return self.newest.run_id

    @property
    def newest(self) -> RoundSummary:
        """The last round so far."""
        return self.rounds[-1]

    @property
    def state(self) -> str:
        """The state of the run: running, finished, failed or lost."""
        return "lost" if self.lost else self.newest.state

    def select_report(self, number: int | None = None) -> RoundReport:
        """Return the report of a round.

        Args:
            number: number of the round. Without one, or where there is no such round, the newest round whose path was
                evaluated is taken, or else the newest.
        """
        # Chosen by summaries: looking at reports would parse all of them.
        places = range(len(self.rounds))
        matches = [place for place in places if self.rounds[place].number == number]
        probed = [place for place in places if self.rounds[place].probed]
        return self.reports[(matches or probed or [-1])[-1]]
