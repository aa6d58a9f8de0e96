"""What Prometheus sees of a round: the metrics of the catalogue, all computed from the round's report.

Recipes, stages and the names of model metrics come from outside, so beyond the first few of each the rest is
counted as "other". A gauge keeps its value until a round of that recipe measures it again. Where a page is asked
for as OpenMetrics, counters and histograms carry the run and the round that moved them last as exemplars.
"""

import math
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from statistics import fmean

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fedbasin.proto.fedbasin_pb2 import (
    AlignmentReport,
    ClientReport,
    PathSums,
    RoundReport,
    StageReport,
)
from fedbasin.server import catalogue as of
from fedbasin.strategies.diagnostics.barrier import (
    Curve,
    accuracy_barrier,
    linear_barrier,
    midpoint_gap,
)
from fedbasin.strategies.outcome import Outcome

_OTHER = "other"
_LONGEST_RUN_ID = 100  # OpenMetrics allows an exemplar 128 characters, names included


class Vocabulary:
    """The first few words heard; any other is "other"."""

    def __init__(self, most: int, words: Iterable[str] = ()) -> None:
        self._most = most
        self._words = set(words)

    def admit(self, word: str) -> str:
        """The word itself, as long as there is room for it."""
        if len(self._words) < self._most:
            self._words.add(word)
        return word if word in self._words else _OTHER


class Telemetry:
    """The metrics, registered once; `observe` brings them up to date with a round."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counters = {
            metric: Counter(of.PREFIX + metric.name, metric.text, metric.labels, registry=registry)
            for metric in of.COUNTERS
        }
        self._gauges = {
            metric: Gauge(of.PREFIX + metric.name, metric.text, metric.labels, registry=registry)
            for metric in of.GAUGES
        }
        self._histograms = {
            metric: Histogram(
                of.PREFIX + metric.name,
                metric.text,
                metric.labels,
                registry=registry,
                buckets=metric.buckets,
            )
            for metric in of.HISTOGRAMS
        }
        self._recipes = Vocabulary(32, of.RECIPES)
        self._stages = Vocabulary(32, of.STAGES)
        self._names = Vocabulary(64)
        self._outcomes = Vocabulary(len(Outcome), (outcome.name for outcome in Outcome))
        self._set(of.BUILD, 1, metadata.version("fedbasin"))
        for recipe in of.RECIPES:
            self._begin(recipe)

    def observe(self, report: RoundReport) -> None:
        """Counts a round. To be called once for each."""
        source = _Source(self._recipes.admit(report.recipe), _exemplar(report))
        self._begin(source.recipe)
        self._observe_progress(source, report)
        for stage in report.stages:
            self._observe_clients(source, self._stages.admit(stage.stage), stage)
        if not report.problem:
            self._observe_success(source, report)

    def _begin(self, recipe: str) -> None:
        """Makes a recipe's series, at zero where they are new: a rate needs a first value."""
        for metric in of.COUNTERS:
            if metric is not of.UPDATES:
                self._counters[metric].labels(recipe)
        for outcome in Outcome.__members__:
            self._counters[of.UPDATES].labels(recipe, outcome)
        self._histograms[of.ROUND_SECONDS].labels(recipe)
        for stage in of.STAGES:
            for metric in (of.STAGE_SECONDS, of.SERVER_SECONDS, of.CLIENT_SECONDS):
                self._histograms[metric].labels(recipe, stage)

    def _observe_progress(self, source: "_Source", report: RoundReport) -> None:
        state = "failed" if report.problem else "finished" if report.last else "running"
        for one in of.STATES:
            self._set(of.STATE, one == state, source.recipe, one)
        if state != "running":
            self._count(of.RUNS_FAILED if report.problem else of.RUNS_FINISHED, source, 1)
        self._set(of.PLANNED, report.rounds, source.recipe)

    def _observe_success(self, source: "_Source", report: RoundReport) -> None:
        """What only a round has that came to its end."""
        recipe = source.recipe
        self._count(of.ROUNDS, source, 1)
        self._time(of.ROUND_SECONDS, source, report.seconds)
        for stage in report.stages:
            name = self._stages.admit(stage.stage)
            self._time(of.STAGE_SECONDS, source, stage.seconds, name)
            self._time(of.SERVER_SECONDS, source, stage.server_seconds, name)
        self._set(of.ROUND, report.round, recipe)
        self._set(of.FINISHED, report.finished.seconds + report.finished.nanos / 1e9, recipe)
        self._set(of.LAST_SECONDS, report.seconds, recipe)
        self._set(of.MEMORY, report.peak_rss_bytes, recipe)
        self._observe_barriers(recipe, report.path)
        self._observe_fused(recipe, report.fused_path)
        self._observe_alignments(recipe, alignments(report))
        for name, value in report.metrics.items():
            self._set(of.MODEL, value, recipe, self._names.admit(name))

    def _observe_clients(self, source: "_Source", name: str, stage: StageReport) -> None:
        fates = Tally(self._outcomes.admit(client.outcome) for client in stage.clients)
        for outcome, number in fates.items():
            self._count(of.UPDATES, source, number, outcome)
        self._count(of.RECEIVED, source, sum(client.bytes_up for client in stage.clients))
        self._count(of.SENT, source, sum(client.bytes_down for client in stage.clients))
        for client in accepted(stage.clients):
            self._time(of.CLIENT_SECONDS, source, client.seconds, name)

    def _observe_barriers(self, recipe: str, path: PathSums) -> None:
        for when, loss, correct in (
            ("before", path.loss_before, path.correct_before),
            ("after", path.loss_after, path.correct_after),
        ):
            if loss and path.examples:
                self._set(of.BARRIER_LOSS, height(linear_barrier, path, loss), recipe, when)
            if correct and path.examples:
                fall = height(accuracy_barrier, path, correct)
                self._set(of.BARRIER_ACCURACY, fall, recipe, when)

    def _observe_fused(self, recipe: str, path: PathSums) -> None:
        if path.loss_after and path.examples:
            rise = height(linear_barrier, path, path.loss_after)
            self._set(of.FUSED_BARRIER, rise, recipe)
            self._set(of.FUSED_GAP, height(midpoint_gap, path, path.loss_after), recipe)

    def _observe_alignments(self, recipe: str, moves: Sequence[AlignmentReport]) -> None:
        if not moves:
            return
        sites = [site for move in moves for site in move.sites]
        self._set(of.GAIN, sum(site.gain for site in sites) / len(moves), recipe)
        self._set(of.DISTANCE, fmean(move.distance_before for move in moves), recipe, "before")
        self._set(of.DISTANCE, fmean(move.distance_after for move in moves), recipe, "after")
        if sites:
            self._set(of.CERTIFIED, fmean(site.certified for site in sites), recipe)
        if errors := [m.endpoint_error for m in moves if m.HasField("endpoint_error")]:
            self._set(of.ENDPOINT_ERROR, max(errors), recipe)

    def _count(self, metric: of.Metric, source: "_Source", amount: float, *labels: str) -> None:
        self._counters[metric].labels(source.recipe, *labels).inc(amount, source.exemplar)

    def _time(self, metric: of.Metric, source: "_Source", seconds: float, *labels: str) -> None:
        timed = self._histograms[metric].labels(source.recipe, *labels)
        timed.observe(seconds, source.exemplar)

    def _set(self, metric: of.Metric, value: float, *labels: str) -> None:
        self._gauges[metric].labels(*labels).set(value)


@dataclass(frozen=True)
class _Source:
    """Where a round's numbers belong: the recipe's label, and the exemplar that names run and round."""

    recipe: str
    exemplar: dict[str, str]


def _exemplar(report: RoundReport) -> dict[str, str]:
    return {"run": report.run_id[:_LONGEST_RUN_ID], "round": str(report.round)}


def height(
    barrier: Callable[[Curve, Curve], float], path: PathSums, sums: Sequence[float]
) -> float:
    """The barrier of the clients' pooled data; NaN where the loss overflowed or the path is no path."""
    try:
        return barrier(path.points, [value / path.examples for value in sums])
    except ValueError:
        return math.nan


def accepted(clients: Iterable[ClientReport]) -> list[ClientReport]:
    """The clients whose update is in the sum."""
    return [client for client in clients if client.outcome == Outcome.accepted.name]


def alignments(report: RoundReport) -> list[AlignmentReport]:
    """How the accepted clients of a round were aligned."""
    return [
        client.alignment
        for stage in report.stages
        for client in accepted(stage.clients)
        if client.HasField("alignment")
    ]
