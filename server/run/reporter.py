"""What is said of a round: the report of one that is finished or failed, and a line about each of its stages."""

import resource
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import wire
from fedbasin.server.run.client_paths import variance_message
from fedbasin.server.run.stage_loop import QuorumLostError, StageResult
from fedbasin.strategies.encodings import read_encodings
from fedbasin.strategies.round.outcomes import Outcome
from fedbasin.strategies.round.stages import Evaluate, Fuse


@dataclass(frozen=True, eq=False)
class Measured:
    """What a round says beside its stages.

    Attributes:
        metrics: of the new global model.
        drift: how the clients' updates lie; None where that was not looked at.
        probe: what the server's own probe set says; None without one.
        digest: of the new global model.
        seconds: from the round's begin.
    """

    metrics: Mapping[str, float]
    drift: pb.Drift | None
    probe: pb.ServerProbe | None
    digest: bytes
    seconds: float


@dataclass(frozen=True)
class Reporter:
    """Writes one run's reports.

    Attributes:
        run_id: Flower's.
        rounds: how many the run has.
        recipe: its name in the settings.
    """

    run_id: str
    rounds: int
    recipe: str

    def finished(
        self, number: int, results: Sequence[StageResult], measured: Measured
    ) -> pb.RoundReport:
        """A round that came to its end, and all of its stages."""
        by_stage = {result.report.stage: result for result in results}
        evaluated = by_stage.get(Evaluate.name)
        report = self._heading(number)
        report.MergeFrom(
            pb.RoundReport(
                seconds=measured.seconds,
                stages=[result.report for result in results],
                path=by_stage[Fuse.name].path,
                fused_path=evaluated.path if evaluated else None,
                drift=measured.drift,
                variance=variance_message(evaluated.variance if evaluated else {}),
                probe=measured.probe,
                metrics=measured.metrics,
                model_digest=measured.digest,
                peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                last=number == self.rounds,
            )
        )
        return report

    def failed(self, number: int, error: BaseException) -> pb.RoundReport:
        """A round that ended the run: what the observer is told; the run's folder stays as it was."""
        report = self._heading(number)
        report.problem = f"{type(error).__name__}: {error}"
        if isinstance(error, QuorumLostError):
            report.stages.append(error.report)
        return report

    def _heading(self, number: int) -> pb.RoundReport:
        """What every report of this run says."""
        now = Timestamp()
        now.GetCurrentTime()
        return pb.RoundReport(
            schema_version=wire.SCHEMA_VERSION,
            run_id=self.run_id,
            round=number,
            rounds=self.rounds,
            recipe=self.recipe,
            finished=now,
        )


def summary(report: pb.StageReport) -> str:
    """One line about a stage, for the log."""
    outcomes = [client.outcome for client in report.clients]
    accepted = outcomes.count(Outcome.accepted.name)
    refused = ", ".join(sorted({o for o in outcomes if o != Outcome.accepted.name}))
    line = f"{report.stage}: {accepted} of {len(outcomes)} clients in {report.seconds:.1f} s"
    line = f"{line} ({refused})" if refused else line
    forms = Counter(str(e.gram) for e in read_encodings(report.encodings).values())
    sent = ", ".join(f"{count} as {form}" for form, count in forms.items())
    return f"{line}; Gram matrices: {sent}" if sent else line
