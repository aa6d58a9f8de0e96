"""A run to be shown: its rounds in brief, and their reports for the little that needs them."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedbasin.proto.fedbasin_pb2 import RoundReport
from fedbasin.server.report.summary import Round, summarise


@dataclass(frozen=True)
class Run:
    """At least one round.

    Attributes:
        reports: by round; a sequence that may read a report only when it is asked for.
        rounds: the same in brief.
    """

    reports: Sequence[RoundReport]
    rounds: Sequence[Round]

    @classmethod
    def of(cls, reports: Sequence[RoundReport]) -> "Run":
        """A run from its reports."""
        return cls(reports, [summarise(report) for report in reports])

    @property
    def name(self) -> str:
        """The run's id."""
        return self.newest.run_id

    @property
    def newest(self) -> Round:
        """Its last round so far."""
        return self.rounds[-1]

    def shown(self, number: int | None = None) -> RoundReport:
        """The report of a round; without one, of the newest whose path was evaluated, or of the newest."""
        places = range(len(self.rounds))
        asked = [place for place in places if self.rounds[place].number == number]
        probed = [place for place in places if self.rounds[place].probed]
        return self.reports[(asked or probed or [-1])[-1]]
