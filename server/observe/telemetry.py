"""What Prometheus sees of a round: the metrics of the catalogue, all computed from the round's report.

Recipes, stages and the names of model metrics come from outside, so beyond the first few of each the rest is
counted as "other". A gauge keeps its value until a round of that recipe measures it again. Where a page is asked
for as OpenMetrics, counters and histograms carry the run and the round that moved them last as exemplars.
"""

import math
from collections import Counter as Count
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fedbasin.proto.fedbasin_pb2 import RoundReport, StageReport
from fedbasin.server.observe import metric_catalogue as of
from fedbasin.server.observe.gauges import accepted, gauges
from fedbasin.strategies.round.outcomes import Outcome

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
            self._count_from_zero(recipe)

    def observe(self, report: RoundReport) -> None:
        """Counts a round. To be called once for each."""
        source = _Source(self._recipes.admit(report.recipe), _exemplar(report))
        self._count_from_zero(source.recipe)
        self._time_from_zero(source.recipe)
        self._observe_progress(source, report)
        for stage in report.stages:
            self._observe_clients(source, self._stages.admit(stage.stage), stage)
        if not report.problem:
            self._observe_success(source, report)

    def _count_from_zero(self, recipe: str) -> None:
        """Makes a recipe's counters, at zero where they are new: a rate needs a first value."""
        for metric in of.COUNTERS:
            if metric.labels == ("recipe",):
                self._counters[metric].labels(recipe)
        for side in of.SIDES:
            self._counters[of.PROBE_SECONDS].labels(recipe, side)
            self._counters[of.PROBE_BYTES].labels(recipe, side)
        for outcome in Outcome.__members__:
            self._counters[of.UPDATES].labels(recipe, outcome)

    def _time_from_zero(self, recipe: str) -> None:
        """The same for its histograms, which are many: a scrape is not to carry those of recipes that nobody runs."""
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
        self._count(of.ROUNDS, source, 1)
        self._time(of.ROUND_SECONDS, source, report.seconds)
        for stage in report.stages:
            name = self._stages.admit(stage.stage)
            self._time(of.STAGE_SECONDS, source, stage.seconds, name)
            self._time(of.SERVER_SECONDS, source, stage.server_seconds, name)
        for metric, value, labels in gauges(report):
            self._set(metric, value, source.recipe, *labels)
        for name, value in report.metrics.items():
            self._set(of.MODEL, value, source.recipe, self._names.admit(name))
        self._count(of.PROBE_SECONDS, source, report.drift.seconds + report.probe.seconds, "server")
        self._count(of.PROBE_BYTES, source, report.probe.spooled_bytes, "server")

    def _observe_clients(self, source: "_Source", name: str, stage: StageReport) -> None:
        fates = Count(self._outcomes.admit(client.outcome) for client in stage.clients)
        for outcome, number in fates.items():
            self._count(of.UPDATES, source, number, outcome)
        self._count(of.RECEIVED, source, sum(client.bytes_up for client in stage.clients))
        self._count(of.SENT, source, sum(client.bytes_down for client in stage.clients))
        probed = [client for client in stage.clients if 0 <= client.probe_seconds < math.inf]
        self._count(of.PROBE_SECONDS, source, sum(c.probe_seconds for c in probed), "clients")
        self._count(of.PROBE_BYTES, source, sum(c.probe_bytes for c in probed), "clients")
        for client in accepted(stage.clients):
            self._time(of.CLIENT_SECONDS, source, client.seconds, name)

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
