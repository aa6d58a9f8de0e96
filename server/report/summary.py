"""A round in the few numbers that fit a row: the source of lists, of curves over rounds and of the JSON API.

A number that was not measured, or that overflowed, is NaN here and null in JSON.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from fedbasin.proto.report import ACCEPTED, PathSums, RoundReport, StageReport
from fedbasin.server.observe.metrics.gauges import ProbeCost, barrier_height, probe_cost, summary_gauges
from fedbasin.strategies.diagnostics.barrier import accuracy_barrier, linear_barrier


@dataclass(frozen=True)
class BeforeAfter:
    """One measure before and after alignment."""

    before: float
    after: float


@dataclass(frozen=True)
class StageSummary:
    """A stage in brief.

    Attributes:
        name: bootstrap, fuse, evaluate or another.
        seconds: from the first request to the end of the stage.
        server_seconds: time that the server spent on decoding, checking, adding and solving.
        bytes_up: bytes received from clients.
        bytes_down: bytes sent to clients.
        outcomes: number of replies by outcome.
    """

    name: str
    seconds: float
    server_seconds: float
    bytes_up: int
    bytes_down: int
    outcomes: Mapping[str, int]


@dataclass(frozen=True)
class RoundSummary:
    """A round in brief.

    Attributes:
        run_id: id of the run.
        number: number of the round, from 1.
        rounds: number of rounds that the run will have.
        recipe: name of the recipe.
        ended: time at which the round ended.
        seconds: duration of the round.
        stages: the stages in order.
        probed: whether clients evaluated the path to the anchor.
        barrier: barrier of the mean loss from anchor to clients, nats.
        accuracy_barrier: barrier of the accuracy from anchor to clients, as a fraction.
        measures: values of the other gauges, by the metric's name without prefix and its labels.
        probe_cost: seconds and bytes of all diagnostics.
        metrics: metrics of the new global model.
        peak_bytes: peak resident memory of the ServerApp.
        last: whether the run ends with this round, as planned.
        problem: why the run ended here without a new model; empty where it did not.
    """

    run_id: str
    number: int
    rounds: int
    recipe: str
    ended: datetime
    seconds: float
    stages: tuple[StageSummary, ...]
    probed: bool
    barrier: BeforeAfter
    accuracy_barrier: BeforeAfter
    measures: Mapping[str, float]
    probe_cost: ProbeCost
    metrics: Mapping[str, float]
    peak_bytes: int
    last: bool
    problem: str

    @property
    def state(self) -> str:
        """The state of the run after this round: running, finished or failed."""
        return "failed" if self.problem else "finished" if self.last else "running"

    @cached_property
    def outcomes(self) -> Counter[str]:
        """The number of replies by outcome, over all stages."""
        return sum((Counter(stage.outcomes) for stage in self.stages), Counter())

    @property
    def accepted(self) -> int:
        """The number of accepted replies."""
        return self.outcomes[ACCEPTED]

    @property
    def refused(self) -> int:
        """The number of replies that were refused or never came."""
        return self.outcomes.total() - self.accepted

    @property
    def bytes_up(self) -> int:
        """The number of bytes received from clients."""
        return sum(stage.bytes_up for stage in self.stages)

    @property
    def bytes_down(self) -> int:
        """The number of bytes sent to clients."""
        return sum(stage.bytes_down for stage in self.stages)


def summarise(report: RoundReport) -> RoundSummary:
    """Summarise a report without looking at spaces, which are most of it."""
    path = report.path or PathSums()
    return RoundSummary(
        report.run_id,
        report.round,
        report.rounds,
        report.recipe,
        report.finished,
        report.seconds,
        tuple(_summarise_stage(stage) for stage in report.stages),
        bool(path.points and path.examples),
        BeforeAfter(
            barrier_height(linear_barrier, path, path.loss_before),
            barrier_height(linear_barrier, path, path.loss_after),
        ),
        BeforeAfter(
            barrier_height(accuracy_barrier, path, path.correct_before),
            barrier_height(accuracy_barrier, path, path.correct_after),
        ),
        {".".join((gauge.name, *labels)): value for gauge, value, labels in summary_gauges(report)},
        probe_cost(report),
        # Sorted, so that columns and colours do not change from round to round.
        dict(sorted(report.metrics.items())),
        report.peak_rss_bytes,
        report.last,
        report.problem,
    )


def summary_to_json(summary: RoundSummary) -> dict[str, object]:
    """Return a summary as an object of JSON."""
    cost = summary.probe_cost
    return {
        "run": summary.run_id,
        "round": summary.number,
        "rounds": summary.rounds,
        "recipe": summary.recipe,
        "ended": summary.ended.isoformat(),
        "seconds": _finite_or_null(summary.seconds),
        "accepted": summary.accepted,
        "outcomes": dict(summary.outcomes),
        "bytes_up": summary.bytes_up,
        "bytes_down": summary.bytes_down,
        "barrier": _finite_values(vars(summary.barrier)),
        "accuracy_barrier": _finite_values(vars(summary.accuracy_barrier)),
        "measures": _finite_values(summary.measures),
        "probing": {
            "client_seconds": _finite_or_null(cost.client_seconds),
            "server_seconds": _finite_or_null(cost.server_seconds),
            "bytes": cost.client_bytes + cost.server_bytes,
        },
        "metrics": _finite_values(summary.metrics),
        "stages": [
            {
                "stage": stage.name,
                "seconds": _finite_or_null(stage.seconds),
                "server_seconds": _finite_or_null(stage.server_seconds),
            }
            for stage in summary.stages
        ],
        "state": summary.state,
        "problem": summary.problem,
    }


def _summarise_stage(stage: StageReport) -> StageSummary:
    return StageSummary(
        stage.stage,
        stage.seconds,
        stage.server_seconds,
        sum(client.bytes_up for client in stage.clients),
        sum(client.bytes_down for client in stage.clients),
        Counter(client.outcome for client in stage.clients),
    )


def _finite_values(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: _finite_or_null(value) for key, value in values.items()}


def _finite_or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
