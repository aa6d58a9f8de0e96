"""A round in the few numbers that fit a row: what lists, curves over rounds and the JSON API are made of.

A number that was not measured, or that overflowed, is NaN here and null in JSON.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from fedbasin.proto.fedbasin_pb2 import PathSums, RoundReport, StageReport
from fedbasin.server.observe.gauges import brief, height, probing
from fedbasin.strategies.diagnostics.barrier import Curve, accuracy_barrier, linear_barrier
from fedbasin.strategies.round.outcomes import Outcome

ACCEPTED = Outcome.accepted.name


@dataclass(frozen=True)
class Pair:
    """One measure before and after alignment."""

    before: float
    after: float


@dataclass(frozen=True)
class Probing:
    """What probing took: seconds of all clients together and of the server, and bytes of both."""

    client_seconds: float
    server_seconds: float
    size: int


@dataclass(frozen=True)
class Stage:
    """What a stage took.

    Attributes:
        name: bootstrap, fuse, evaluate or another.
        seconds: from the first request to the stage's value.
        server_seconds: decoding, checking, folding and solving among them.
        bytes_up: received from clients.
        bytes_down: sent to clients.
        outcomes: replies by what became of them.
    """

    name: str
    seconds: float
    server_seconds: float
    bytes_up: int
    bytes_down: int
    outcomes: Mapping[str, int]


@dataclass(frozen=True)
class Round:
    """A round in brief.

    Attributes:
        run_id: the run.
        number: the round, from 1.
        of: how many the run will have.
        recipe: how updates are fused.
        ended: when.
        seconds: from start to end.
        stages: what each took, in order.
        probed: whether clients evaluated the path to the anchor.
        barrier: of the mean loss from anchor to clients, nats.
        accuracy_barrier: the same of the accuracy, a share.
        measures: what else was measured, by a metric's name without prefix and its labels.
        probing: what all of it took.
        metrics: of the new global model.
        peak_bytes: resident memory of the ServerApp at its highest.
        last: whether the run ends with it, as planned.
        problem: why the run ended here without a new model; empty where it did not.
    """

    run_id: str
    number: int
    of: int
    recipe: str
    ended: datetime
    seconds: float
    stages: tuple[Stage, ...]
    probed: bool
    barrier: Pair
    accuracy_barrier: Pair
    measures: Mapping[str, float]
    probing: Probing
    metrics: Mapping[str, float]
    peak_bytes: int
    last: bool
    problem: str

    @property
    def state(self) -> str:
        """Of the run after this round: running, finished or failed."""
        return "failed" if self.problem else "finished" if self.last else "running"

    @cached_property
    def outcomes(self) -> Counter[str]:
        """Replies of all stages by what became of them."""
        return sum((Counter(stage.outcomes) for stage in self.stages), Counter())

    @property
    def accepted(self) -> int:
        """Replies that were taken."""
        return self.outcomes[ACCEPTED]

    @property
    def refused(self) -> int:
        """Replies that were not, and replies that never came."""
        return self.outcomes.total() - self.accepted

    @property
    def bytes_up(self) -> int:
        """Received from clients."""
        return sum(stage.bytes_up for stage in self.stages)

    @property
    def bytes_down(self) -> int:
        """Sent to clients."""
        return sum(stage.bytes_down for stage in self.stages)


def summarise(report: RoundReport) -> Round:
    """A report in brief. It does not look at spaces, which are most of a report."""
    path = report.path
    return Round(
        report.run_id,
        report.round,
        report.rounds,
        report.recipe,
        report.finished.ToDatetime(UTC),
        report.seconds,
        tuple(_stage(stage) for stage in report.stages),
        bool(path.points and path.examples),
        Pair(
            _height(linear_barrier, path, path.loss_before),
            _height(linear_barrier, path, path.loss_after),
        ),
        Pair(
            _height(accuracy_barrier, path, path.correct_before),
            _height(accuracy_barrier, path, path.correct_after),
        ),
        {".".join((metric.name, *labels)): value for metric, value, labels in brief(report)},
        Probing(*probing(report)),
        dict(sorted(report.metrics.items())),
        report.peak_rss_bytes,
        report.last,
        report.problem,
    )


def as_json(of: Round) -> dict[str, object]:
    """A round as JSON has it."""
    return {
        "run": of.run_id,
        "round": of.number,
        "rounds": of.of,
        "recipe": of.recipe,
        "ended": of.ended.isoformat(),
        "seconds": _or_null(of.seconds),
        "accepted": of.accepted,
        "outcomes": dict(of.outcomes),
        "bytes_up": of.bytes_up,
        "bytes_down": of.bytes_down,
        "barrier": _finite({"before": of.barrier.before, "after": of.barrier.after}),
        "accuracy_barrier": _finite(
            {"before": of.accuracy_barrier.before, "after": of.accuracy_barrier.after}
        ),
        "measures": _finite(of.measures),
        "probing": {
            "client_seconds": of.probing.client_seconds,
            "server_seconds": _or_null(of.probing.server_seconds),
            "bytes": of.probing.size,
        },
        "metrics": _finite(of.metrics),
        "stages": [
            {
                "stage": stage.name,
                "seconds": _or_null(stage.seconds),
                "server_seconds": _or_null(stage.server_seconds),
            }
            for stage in of.stages
        ],
        "state": of.state,
        "problem": of.problem,
    }


def _stage(stage: StageReport) -> Stage:
    return Stage(
        stage.stage,
        stage.seconds,
        stage.server_seconds,
        sum(client.bytes_up for client in stage.clients),
        sum(client.bytes_down for client in stage.clients),
        Counter(client.outcome for client in stage.clients),
    )


def _height(
    barrier: Callable[[Curve, Curve], float], path: PathSums, sums: Sequence[float]
) -> float:
    return height(barrier, path, sums) if sums and path.examples else math.nan


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: _or_null(value) for key, value in values.items()}


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
