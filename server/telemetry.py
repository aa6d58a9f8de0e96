"""What Prometheus sees of a round: one catalogue of metrics, all computed from the round's report.

No label holds a client or a run: their number has no bound. Recipes, stages and the names of model metrics
come from outside, so beyond the first few of each the rest is counted as "other". A gauge keeps its value
until a round of that recipe measures it again.
"""

import math
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fedbasin.proto.fedbasin_pb2 import AlignmentReport, ClientReport, PathSums, RoundReport
from fedbasin.strategies.diagnostics.barrier import Curve, accuracy_barrier, linear_barrier
from fedbasin.strategies.outcome import Outcome

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)
_OTHER = "other"


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
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"fedbasin_{name}", text, ("recipe", *labels), registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"fedbasin_{name}", text, ("recipe", *labels), registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            labels = ("recipe", *labels)
            return Histogram(f"fedbasin_{name}", text, labels, registry=registry, buckets=_SECONDS)

        self.rounds = counter("rounds_total", "Rounds finished.")
        self.runs = counter("runs_finished_total", "Runs that came to their last round.")
        self.updates = counter(
            "updates_total", "Clients' replies by what became of them.", "outcome"
        )
        self.received = counter("received_bytes_total", "Bytes received from clients.")
        self.sent = counter("sent_bytes_total", "Bytes sent to clients.")
        self.round_seconds = seconds("round_duration_seconds", "From a round's start to its end.")
        self.stage_seconds = seconds(
            "stage_duration_seconds", "From the first request of a stage to its value.", "stage"
        )
        self.server_seconds = seconds(
            "server_seconds", "Decoding, validating, folding and solving in a stage.", "stage"
        )
        self.client_seconds = seconds(
            "client_duration_seconds", "From a request to its accepted reply.", "stage"
        )
        self.round = gauge("round", "Number of the last round finished.")
        self.finished = gauge("last_round_timestamp_seconds", "When the last round finished.")
        self.memory = gauge("server_peak_rss_bytes", "Peak resident memory of the ServerApp.")
        self.barrier_loss = gauge(
            "barrier_loss",
            "Rise of the mean loss above the straight line between anchor and clients, "
            "before and after alignment, when it was last probed.",
            "when",
        )
        self.barrier_accuracy = gauge(
            "barrier_accuracy",
            "Fall of the accuracy below the straight line between anchor and clients, "
            "before and after alignment, when it was last probed.",
            "when",
        )
        self.gain = gauge(
            "alignment_gain", "Rise of the matching objective, summed over sites, mean of clients."
        )
        self.certified = gauge(
            "certified_sites_ratio", "Share of sites whose identity alignment was proven optimal."
        )
        self.distance = gauge(
            "anchor_distance", "L2 distance from client to anchor, mean of clients.", "when"
        )
        self.model = gauge("model_metric", "Metrics of the new global model.", "name")
        self._recipes = Vocabulary(32)
        self._stages = Vocabulary(32)
        self._names = Vocabulary(64)
        self._outcomes = Vocabulary(len(Outcome), (outcome.name for outcome in Outcome))

    def observe(self, report: RoundReport) -> None:
        """Counts a round. To be called once for each."""
        recipe = self._recipes.admit(report.recipe)
        self._observe_progress(recipe, report)
        self._observe_stages(recipe, report)
        self._observe_barriers(recipe, report.path)
        self._observe_alignments(recipe, alignments(report))
        for name, value in report.metrics.items():
            self.model.labels(recipe, self._names.admit(name)).set(value)

    def _observe_progress(self, recipe: str, report: RoundReport) -> None:
        self.rounds.labels(recipe).inc()
        self.runs.labels(recipe).inc(report.last)
        self.round.labels(recipe).set(report.round)
        self.round_seconds.labels(recipe).observe(report.seconds)
        self.finished.labels(recipe).set(report.finished.seconds + report.finished.nanos / 1e9)
        self.memory.labels(recipe).set(report.peak_rss_bytes)

    def _observe_stages(self, recipe: str, report: RoundReport) -> None:
        for stage in report.stages:
            name = self._stages.admit(stage.stage)
            self.stage_seconds.labels(recipe, name).observe(stage.seconds)
            self.server_seconds.labels(recipe, name).observe(stage.server_seconds)
            self._observe_clients(recipe, name, stage.clients)

    def _observe_clients(self, recipe: str, stage: str, clients: Sequence[ClientReport]) -> None:
        fates = Tally(self._outcomes.admit(client.outcome) for client in clients)
        for outcome in (*Outcome.__members__, *fates):  # also the zeros: a rate needs a first value
            self.updates.labels(recipe, outcome).inc(fates.pop(outcome, 0))
        self.received.labels(recipe).inc(sum(client.bytes_up for client in clients))
        self.sent.labels(recipe).inc(sum(client.bytes_down for client in clients))
        for client in accepted(clients):
            self.client_seconds.labels(recipe, stage).observe(client.seconds)

    def _observe_barriers(self, recipe: str, path: PathSums) -> None:
        for when, loss, correct in (
            ("before", path.loss_before, path.correct_before),
            ("after", path.loss_after, path.correct_after),
        ):
            if loss and path.examples:
                rise = height(linear_barrier, path, loss)
                self.barrier_loss.labels(recipe, when).set(rise)
            if correct and path.examples:
                fall = height(accuracy_barrier, path, correct)
                self.barrier_accuracy.labels(recipe, when).set(fall)

    def _observe_alignments(self, recipe: str, moves: Sequence[AlignmentReport]) -> None:
        if not moves:
            return
        sites = [site for move in moves for site in move.sites]
        self.gain.labels(recipe).set(sum(site.gain for site in sites) / len(moves))
        self.distance.labels(recipe, "before").set(fmean(move.distance_before for move in moves))
        self.distance.labels(recipe, "after").set(fmean(move.distance_after for move in moves))
        if sites:
            self.certified.labels(recipe).set(fmean(site.certified for site in sites))


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
