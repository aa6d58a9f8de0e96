"""The metrics that Prometheus scrapes, all computed from the reports of rounds.

Recipes, stages and the names of model metrics come from outside, so beyond the first few of each the rest is
counted as "other". A gauge keeps its value until a round of that recipe measures it again. Where a page is requested
as OpenMetrics, counters and histograms carry the run and the round that moved them last as exemplars.
"""

from collections.abc import Iterable
from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from fedbasin.proto.report import IncidentKind, RoundReport
from fedbasin.server.observe.metrics import metric_catalogue as catalogue
from fedbasin.server.observe.metrics.metric_catalogue import Metric
from fedbasin.server.observe.metrics.round_contribution import RoundContribution, tally
from fedbasin.server.printable import printable
from fedbasin.strategies.judging.outcomes import Outcome

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
        # Nobody reads the times at which series were created, a third of each scrape.
        disable_created_metrics()  # type: ignore[no-untyped-call]
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
        # By label. Each recipe has some hundred series: a handful beside the known ones.
        self._words = {
            "recipe": Vocabulary(len(catalogue.RECIPES) + 4, catalogue.RECIPES),
            "stage": Vocabulary(len(catalogue.STAGES) + 4, catalogue.STAGES),
            "name": Vocabulary(64),
            # Full from the start: outcomes and kinds are closed lists, and any other word counts as "other".
            "outcome": Vocabulary(len(Outcome), (outcome.name for outcome in Outcome)),
            "kind": Vocabulary(len(IncidentKind), IncidentKind.__members__),
        }
        self._gauges[catalogue.BUILD].labels(metadata.version("fedbasin")).set(1)

    def observe(self, report: RoundReport) -> None:
        """Count a round; to be called once for each."""
        self.add(tally(report))

    def add(self, contribution: RoundContribution) -> None:
        """Count what a round contributes; to be called once for each."""
        exemplar = {"run": printable(contribution.run_id)[:_LONGEST_RUN_ID], "round": str(contribution.round)}
        recipe = self._words["recipe"].admit(contribution.recipe)
        self._create_counters(recipe)
        self._create_histograms(recipe)
        for metric, amount, words in contribution.counts:
            self._counters[metric].labels(recipe, *self._admit(metric, words)).inc(amount, exemplar)
        for metric, durations, words in contribution.durations:
            histogram = self._histograms[metric].labels(recipe, *self._admit(metric, words))
            for seconds in durations[:-1]:
                histogram.observe(seconds)
            for seconds in durations[-1:]:  # an exemplar for each of thousands would take most of the time
                histogram.observe(seconds, exemplar)
        for metric, value, words in contribution.gauges:
            self._gauges[metric].labels(recipe, *self._admit(metric, words)).set(value)

    def set_state(self, recipe: str, state: str) -> None:
        """Show a state for the newest run of a recipe, between its reports."""
        recipe = self._words["recipe"].admit(recipe)
        self._create_counters(recipe)
        for name in catalogue.STATES:
            self._gauges[catalogue.STATE].labels(recipe, name).set(name == state)

    def _admit(self, metric: Metric, words: tuple[str, ...]) -> list[str]:
        """Return the labels after the recipe, those from outside within their vocabularies."""
        names = metric.labels[1:]
        return [
            self._words[name].admit(word) if name in self._words else word
            for name, word in zip(names, words, strict=True)
        ]

    def _create_counters(self, recipe: str) -> None:
        """Create the counters of a recipe at zero once one of its runs begins: a rate needs a first value.

        Those of all recipes would be most of every scrape.
        """
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
