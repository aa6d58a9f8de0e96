"""The metrics that Prometheus scrapes, all computed from the reports of rounds.

Recipes, stages and the names of model metrics come from outside, so beyond the first few of each the rest is
counted as "other". A gauge keeps its value until a round of that recipe measures it again. Where a page is requested
as OpenMetrics, counters and histograms carry the run and the round that moved them last as exemplars.
"""

from collections import Counter as Count
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fedbasin.proto.report import IncidentKind, RoundReport, StageReport
from fedbasin.server.observe import metric_catalogue as catalogue
from fedbasin.server.observe.gauges import probe_cost, round_gauges
from fedbasin.server.observe.metric_catalogue import Metric
from fedbasin.server.printable import printable
from fedbasin.strategies.round.outcomes import Outcome

_OTHER = "other"
_LONGEST_RUN_ID = 100  # OpenMetrics allows an exemplar 128 characters, names included
_LONGEST_LABEL = 100


class Vocabulary:
    """A bounded set of words: the first to come are kept, any later one counts as "other"."""

    # Prometheus keeps each value of a label for good, and a client could make up words without end.
    def __init__(self, most: int, words: Iterable[str] = ()) -> None:
        self._most = most
        self._words = set(words)

    def admit(self, word: str) -> str:
        """Return the word, made printable, while there is room for it, and "other" afterwards."""
        word = printable(word, _LONGEST_LABEL)
        if len(self._words) < self._most:
            self._words.add(word)
        return word if word in self._words else _OTHER


class Telemetry:
    """The metrics of the catalogue in a registry; `observe` brings them up to date with a round."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counters = {
            metric: Counter(catalogue.PREFIX + metric.name, metric.text, metric.labels, registry=registry)
            for metric in catalogue.COUNTERS
        }
        self._gauges = {
            metric: Gauge(catalogue.PREFIX + metric.name, metric.text, metric.labels, registry=registry)
            for metric in catalogue.GAUGES
        }
        self._histograms = {
            metric: Histogram(
                catalogue.PREFIX + metric.name, metric.text, metric.labels, registry=registry, buckets=metric.buckets
            )
            for metric in catalogue.HISTOGRAMS
        }
        # Each recipe has some hundred series: a handful beside the known ones.
        self._recipes = Vocabulary(len(catalogue.RECIPES) + 4, catalogue.RECIPES)
        self._stages = Vocabulary(len(catalogue.STAGES) + 4, catalogue.STAGES)
        self._names = Vocabulary(64)
        # Full from the start: outcomes are a closed list, and any other word counts as "other".
        self._outcomes = Vocabulary(len(Outcome), (outcome.name for outcome in Outcome))
        self._kinds = Vocabulary(len(IncidentKind), IncidentKind.__members__)
        self._set(catalogue.BUILD, 1, metadata.version("fedbasin"))
        for recipe in catalogue.RECIPES:
            self._create_counters(recipe)

    def observe(self, report: RoundReport) -> None:
        """Count a round; to be called once for each."""
        exemplar = {"run": printable(report.run_id)[:_LONGEST_RUN_ID], "round": str(report.round)}
        source = _Source(self._recipes.admit(report.recipe), exemplar)
        self._create_counters(source.recipe)
        self._create_histograms(source.recipe)
        self._observe_progress(source, report)
        self._observe_probe_cost(source, report)
        for incident in report.incidents:
            self._count(catalogue.INCIDENTS, source, 1, self._kinds.admit(incident.kind))
        for stage in report.stages:
            self._observe_clients(source, self._stages.admit(stage.stage), stage)
        if not report.problem:
            self._observe_success(source, report)

    def _create_counters(self, recipe: str) -> None:
        """Create the counters of a recipe at zero where they are new: a rate needs a first value."""
        for metric in catalogue.COUNTERS:
            if metric.labels == ("recipe",):
                self._counters[metric].labels(recipe)
        for side in catalogue.SIDES:
            self._counters[catalogue.PROBE_SECONDS].labels(recipe, side)
            self._counters[catalogue.PROBE_BYTES].labels(recipe, side)
        for outcome in Outcome.__members__:
            self._counters[catalogue.UPDATES].labels(recipe, outcome)
        for kind in IncidentKind.__members__:
            self._counters[catalogue.INCIDENTS].labels(recipe, kind)

    def _create_histograms(self, recipe: str) -> None:
        """Create the histograms of a recipe that reports; those of all recipes would fill every scrape."""
        self._histograms[catalogue.ROUND_SECONDS].labels(recipe)
        for stage in catalogue.STAGES:
            for metric in (catalogue.STAGE_SECONDS, catalogue.SERVER_SECONDS, catalogue.CLIENT_SECONDS):
                self._histograms[metric].labels(recipe, stage)

    def _observe_progress(self, source: "_Source", report: RoundReport) -> None:
        state = "failed" if report.problem else "finished" if report.last else "running"
        for name in catalogue.STATES:
            self._set(catalogue.STATE, name == state, source.recipe, name)
        if state != "running":
            ended = catalogue.RUNS_FAILED if report.problem else catalogue.RUNS_FINISHED
            self._count(ended, source, 1)
        self._set(catalogue.PLANNED, report.rounds, source.recipe)

    def _observe_probe_cost(self, source: "_Source", report: RoundReport) -> None:
        cost = probe_cost(report)
        self._count(catalogue.PROBE_SECONDS, source, cost.client_seconds, "clients")
        self._count(catalogue.PROBE_SECONDS, source, cost.server_seconds, "server")
        self._count(catalogue.PROBE_BYTES, source, cost.client_bytes, "clients")
        self._count(catalogue.PROBE_BYTES, source, cost.server_bytes, "server")

    def _observe_success(self, source: "_Source", report: RoundReport) -> None:
        """Count what only a round has that succeeded."""
        self._count(catalogue.ROUNDS, source, 1)
        self._time(catalogue.ROUND_SECONDS, source, report.seconds)
        for stage in report.stages:
            name = self._stages.admit(stage.stage)
            self._time(catalogue.STAGE_SECONDS, source, stage.seconds, name)
            self._time(catalogue.SERVER_SECONDS, source, stage.server_seconds, name)
        for metric, value, labels in round_gauges(report):
            self._set(metric, value, source.recipe, *labels)
        for name, value in report.metrics.items():
            self._set(catalogue.MODEL, value, source.recipe, self._names.admit(name))

    def _observe_clients(self, source: "_Source", name: str, stage: StageReport) -> None:
        outcomes = Count(self._outcomes.admit(client.outcome) for client in stage.clients)
        for outcome, number in outcomes.items():
            self._count(catalogue.UPDATES, source, number, outcome)
        received = sum(client.bytes_up for client in stage.clients)
        self._count(catalogue.RECEIVED, source, received)
        self._count(catalogue.SENT, source, sum(client.bytes_down for client in stage.clients))
        histogram = self._histograms[catalogue.CLIENT_SECONDS].labels(source.recipe, name)
        for client in stage.accepted:
            histogram.observe(client.seconds, source.exemplar)

    def _count(self, metric: Metric, source: "_Source", amount: float, *labels: str) -> None:
        self._counters[metric].labels(source.recipe, *labels).inc(amount, source.exemplar)

    def _time(self, metric: Metric, source: "_Source", seconds: float, *labels: str) -> None:
        histogram = self._histograms[metric].labels(source.recipe, *labels)
        histogram.observe(seconds, source.exemplar)

    def _set(self, metric: Metric, value: float, *labels: str) -> None:
        self._gauges[metric].labels(*labels).set(value)


@dataclass(frozen=True)
class _Source:
    """The origin of a round's numbers: the label of the recipe, and the exemplar that names run and round."""

    recipe: str
    exemplar: dict[str, str]
