"""The contribution of one round to the metrics: plain numbers, which another process may compute from the report."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from fedbasin.proto.report import RoundReport, StageReport
from fedbasin.server.observe.metrics import metric_catalogue as catalogue
from fedbasin.server.observe.metrics.gauges import Gauge, probe_cost, round_gauges
from fedbasin.server.observe.metrics.metric_catalogue import Metric

Count: TypeAlias = tuple[Metric, float, tuple[str, ...]]
Durations: TypeAlias = tuple[Metric, tuple[float, ...], tuple[str, ...]]


@dataclass(frozen=True)
class RoundContribution:
    """The contribution of a round, as entries of a metric, a value and the labels after the recipe.

    Attributes:
        run_id: id of the run.
        round: number of the round.
        recipe: name of the recipe.
        counts: what counters rise by.
        durations: seconds for histograms.
        gauges: values of gauges.
    """

    run_id: str
    round: int
    recipe: str
    counts: tuple[Count, ...]
    durations: tuple[Durations, ...]
    gauges: tuple[Gauge, ...]


def tally(report: RoundReport) -> RoundContribution:
    """Return the contribution of a report."""
    return RoundContribution(
        report.run_id,
        report.round,
        report.recipe,
        tuple(_counts(report)),
        tuple(_durations(report)),
        tuple(_gauges(report)),
    )


def _counts(report: RoundReport) -> Iterator[Count]:
    cost = probe_cost(report)
    yield catalogue.PROBE_SECONDS, cost.client_seconds, ("clients",)
    yield catalogue.PROBE_SECONDS, cost.server_seconds, ("server",)
    yield catalogue.PROBE_BYTES, cost.client_bytes, ("clients",)
    yield catalogue.PROBE_BYTES, cost.server_bytes, ("server",)
    for kind, number in Counter(incident.kind for incident in report.incidents).items():
        yield catalogue.INCIDENTS, number, (kind,)
    for stage in report.stages:
        for outcome, number in Counter(client.outcome for client in stage.clients).items():
            yield catalogue.UPDATES, number, (outcome,)
        yield catalogue.RECEIVED, sum(client.bytes_up for client in stage.clients), ()
        yield catalogue.SENT, sum(client.bytes_down for client in stage.clients), ()
    if report.problem:
        yield catalogue.RUNS_FAILED, 1, ()
        return
    yield catalogue.ROUNDS, 1, ()
    if report.last:
        yield catalogue.RUNS_FINISHED, 1, ()


def _durations(report: RoundReport) -> Iterator[Durations]:
    for stage in report.stages:
        yield catalogue.CLIENT_SECONDS, tuple(client.seconds for client in stage.accepted), (stage.stage,)
    if not report.problem:
        yield catalogue.ROUND_SECONDS, (report.seconds,), ()
        for stage in report.stages:
            yield from _stage_durations(stage)


def _stage_durations(stage: StageReport) -> Iterator[Durations]:
    yield catalogue.STAGE_SECONDS, (stage.seconds,), (stage.stage,)
    yield catalogue.SERVER_SECONDS, (stage.server_seconds,), (stage.stage,)


def _gauges(report: RoundReport) -> Iterator[Gauge]:
    state = "failed" if report.problem else "finished" if report.last else "running"
    for name in catalogue.STATES:
        yield catalogue.STATE, name == state, (name,)
    yield catalogue.PLANNED, report.rounds, ()
    if not report.problem:
        yield from round_gauges(report)
        for name, value in report.metrics.items():
            yield catalogue.MODEL, value, (name,)
