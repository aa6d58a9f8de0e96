"""A run to be shown: its reports and their summaries."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedbasin.proto.fedbasin_pb2 import RoundReport
from fedbasin.server.report.summary import Round, summarise


@dataclass(frozen=True)
class Run:
    """At least one round.

    Attributes:
        reports: by round.
        rounds: the same in brief.
    """

    reports: Sequence[RoundReport]
    rounds: Sequence[Round]

    @classmethod
    def of(cls, reports: Sequence[RoundReport], before: "Run | None" = None) -> "Run":
        """A run from its reports.

        Args:
            reports: by round.
            before: the run as it was; the summaries of reports that it has too are taken from it.
        """
        known = {id(report): brief for report, brief in before.pairs()} if before else {}
        return cls(reports, [known.get(id(report)) or summarise(report) for report in reports])

    def pairs(self) -> Iterator[tuple[RoundReport, Round]]:
        """Each report with its summary."""
        return zip(self.reports, self.rounds, strict=True)

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
        asked = [one for one in self.reports if one.round == number]
        probed = [one for one in self.reports if one.path.points and one.path.examples]
        return (asked or probed or list(self.reports))[-1]
