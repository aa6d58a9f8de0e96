"""Reports of rounds that are finished or failed."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fedbasin.proto.report import (
    Choice,
    LayerVariance,
    PathSums,
    RoundReport,
    ServerProbe,
    StageReport,
    Step,
    UpdateCosines,
)
from fedbasin.server.exchange.quorum import QuorumLostError


@dataclass(frozen=True, eq=False)
class Measurements:
    """The measurements of a round beside its stages; as in `RoundReport`."""

    path: PathSums | None = None
    fused_path: PathSums | None = None
    update_cosines: UpdateCosines | None = None
    variance: Mapping[str, float] = field(default_factory=dict)
    probe: ServerProbe | None = None
    train_metrics: Mapping[str, object] = field(default_factory=dict)
    evaluate_metrics: Mapping[str, object] = field(default_factory=dict)
    server_metrics: Mapping[str, object] = field(default_factory=dict)
    digest: bytes = b""
    choice: Choice | None = None
    step: Step | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Reporter:
    """A writer of one run's reports.

    Attributes:
        run_id: Flower's id of the run.
        rounds: number of rounds that the run has.
        recipe: name of the recipe in the settings.
    """

    run_id: str
    rounds: int
    recipe: str

    def finished(self, number: int, stages: Sequence[StageReport], measured: Measurements) -> RoundReport:
        """Return the report of a round that came to its end."""
        return RoundReport(
            run_id=self.run_id,
            round=number,
            rounds=self.rounds,
            recipe=self.recipe,
            finished=datetime.now(UTC),
            seconds=measured.seconds,
            stages=tuple(stages),
            path=measured.path,
            fused_path=measured.fused_path,
            update_cosines=measured.update_cosines,
            variance=tuple(LayerVariance(*entry) for entry in measured.variance.items()),
            probe=measured.probe,
            train_metrics=_scalars(measured.train_metrics),
            evaluate_metrics=_scalars(measured.evaluate_metrics),
            server_metrics=_scalars(measured.server_metrics),
            model_digest=measured.digest,
            choice=measured.choice,
            step=measured.step,
            peak_rss_bytes=_peak_rss_bytes(),
            last=number == self.rounds,
        )

    def failed(self, number: int, error: BaseException) -> RoundReport:
        """Return the report of a round that ended the run, for the observer; the run's folder stays as it was."""
        stages = (error.report,) if isinstance(error, QuorumLostError) else ()
        return RoundReport(
            run_id=self.run_id,
            round=number,
            rounds=self.rounds,
            recipe=self.recipe,
            finished=datetime.now(UTC),
            stages=stages,
            problem=f"{type(error).__name__}: {error}",
        )


def _scalars(metrics: Mapping[str, object]) -> dict[str, float]:
    return {name: float(v) for name, v in metrics.items() if isinstance(v, int | float)}


def _peak_rss_bytes() -> int:
    """Return the peak memory of this process; 0 where the platform does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
