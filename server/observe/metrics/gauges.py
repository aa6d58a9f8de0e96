"""The numbers of a round's report: the gauges of the catalogue, and the arithmetic behind them.

Means are over the accepted clients. What no client measured has no number, so that its gauge keeps its value.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

from fedbasin.proto.report import AlignmentReport, PathSums, ProbedPath, RoundReport, ServerProbe, UpdateCosines
from fedbasin.server.observe.metrics import metric_catalogue as catalogue
from fedbasin.strategies.diagnostics.barrier import (
    Curve,
    accuracy_barrier,
    area,
    linear_barrier,
    mean_barrier,
    midpoint_gap,
)

Gauge: TypeAlias = tuple[catalogue.Metric, float, tuple[str, ...]]
Barrier: TypeAlias = Callable[[Curve, Curve], float]

LOSS_BARRIERS: dict[str, Barrier] = {
    "linear": linear_barrier,
    "above_mean": mean_barrier,
    "midpoint": midpoint_gap,
    "area": area,
}


@dataclass(frozen=True)
class ProbeCost:
    """The cost of all diagnostics in a round.

    Attributes:
        client_seconds: seconds of all clients together.
        server_seconds: seconds of the server.
        client_bytes: bytes of the diagnostics in the clients' replies.
        server_bytes: bytes that the server wrote to disk.
    """

    client_seconds: float
    server_seconds: float
    client_bytes: int
    server_bytes: int


def round_gauges(report: RoundReport) -> Iterator[Gauge]:
    """Yield every gauge of a round that succeeded, with its labels after the recipe."""
    yield catalogue.ROUND, report.round, ()
    yield catalogue.FINISHED, report.finished.timestamp(), ()
    yield catalogue.LAST_SECONDS, report.seconds, ()
    yield catalogue.MEMORY, report.peak_rss_bytes, ()
    yield from _anchor_path_gauges(report.path)
    yield from _alignment_gauges(accepted_alignments(report))
    yield from summary_gauges(report)


def summary_gauges(report: RoundReport) -> Iterator[Gauge]:
    """Yield the gauges for which spaces need not be looked at; spaces are most of a report."""
    yield from _fused_path_gauges(report.fused_path)
    yield from _singular_vector_gauges(accepted_alignments(report))
    yield from _update_gauges(report.update_cosines)
    if ratios := [layer.ratio for layer in report.variance]:
        yield catalogue.VARIANCE, min(ratios), ("lowest",)
        yield catalogue.VARIANCE, fmean(ratios), ("mean",)
    yield from _probe_gauges(report.probe or ServerProbe())


def probe_cost(report: RoundReport) -> ProbeCost:
    """Add up the cost of all diagnostics in a round."""
    # A client may report any number of seconds; a negative one must not lower a counter.
    clients = [client for stage in report.stages for client in stage.clients if 0 <= client.probe_seconds < math.inf]
    cosines, probe = report.update_cosines, report.probe or ServerProbe()
    return ProbeCost(
        sum(client.probe_seconds for client in clients),
        (cosines.seconds if cosines else 0.0) + probe.seconds,
        sum(client.probe_bytes for client in clients),
        probe.spooled_bytes,
    )


def barrier_height(barrier: Barrier, path: PathSums, sums: Sequence[float]) -> float:
    """Return a barrier of the clients' pooled data.

    Args:
        barrier: function of the points and the means.
        path: the path with its points and its number of examples.
        sums: one of the path's curves.

    Returns:
        The barrier; NaN where the curve was not measured, overflowed or does not fit the points.
    """
    if not (sums and path.examples):
        return math.nan
    try:
        return barrier(path.points, [value / path.examples for value in sums])
    except ValueError:
        return math.nan


def accepted_alignments(report: RoundReport) -> list[AlignmentReport]:
    """Return the alignments of the accepted clients of a round."""
    return [client.alignment for stage in report.stages for client in stage.accepted if client.alignment is not None]


def highest_barrier(barrier: Barrier, paths: Iterable[ProbedPath]) -> float:
    """Return the largest loss barrier of some paths; NaN where none is finite."""
    # The highest and not the mean: one client outside of the basin is enough to spoil an average.
    heights = (barrier_height(barrier, probed.path, probed.path.loss_after) for probed in paths)
    return max(filter(math.isfinite, heights), default=math.nan)


def probe_accuracies(probe: ServerProbe) -> dict[str, float]:
    """Return accuracies on the server's probe set: of the fused model, the clients (mean) and their ensemble."""
    paths = [fused.path for fused in probe.fused if fused.path.correct_after and fused.path.examples]
    if not paths:
        return {}
    return {
        # Every path begins at the fused model (t = 0), so the first one tells its accuracy.
        "fused": paths[0].correct_after[0] / paths[0].examples,
        "clients": fmean(path.correct_after[-1] / path.examples for path in paths),
        "ensemble": probe.ensemble_accuracy,
    }


def _anchor_path_gauges(path: PathSums | None) -> Iterator[Gauge]:
    if path is None or not path.examples:
        return
    for when, loss, correct in (
        ("before", path.loss_before, path.correct_before),
        ("after", path.loss_after, path.correct_after),
    ):
        if loss:
            yield catalogue.BARRIER_LOSS, barrier_height(linear_barrier, path, loss), (when,)
        if correct:
            accuracy = barrier_height(accuracy_barrier, path, correct)
            yield catalogue.BARRIER_ACCURACY, accuracy, (when,)


def _fused_path_gauges(path: PathSums | None) -> Iterator[Gauge]:
    if path and path.loss_after and path.examples:
        yield catalogue.FUSED_BARRIER, barrier_height(linear_barrier, path, path.loss_after), ()
        yield catalogue.FUSED_GAP, barrier_height(midpoint_gap, path, path.loss_after), ()


def _alignment_gauges(alignments: Sequence[AlignmentReport]) -> Iterator[Gauge]:
    if not alignments:
        return
    spaces = [space for alignment in alignments for space in alignment.spaces]
    yield catalogue.GAIN, sum(space.gain for space in spaces) / len(alignments), ()
    yield catalogue.DISTANCE, fmean(a.distance_before for a in alignments), ("before",)
    yield catalogue.DISTANCE, fmean(a.distance_after for a in alignments), ("after",)
    if spaces:
        yield catalogue.CERTIFIED, fmean(space.certified for space in spaces), ()
        yield catalogue.FIXED_POINTS, fmean(space.fixed_points for space in spaces), ()
    if errors := [a.endpoint_error for a in alignments if a.endpoint_error is not None]:
        # The maximum: a single client whose function changed makes its other numbers worthless.
        yield catalogue.ENDPOINT_ERROR, max(errors), ()
    if skews := [space.skew_before for space in spaces if space.skew_before is not None]:
        yield catalogue.SKEW, fmean(skews), ("before",)
    if skews := [space.skew_after for space in spaces if space.skew_after is not None]:
        yield catalogue.SKEW, fmean(skews), ("after",)


def _singular_vector_gauges(alignments: Sequence[AlignmentReport]) -> Iterator[Gauge]:
    if measured := [a.singular_vectors for a in alignments if a.singular_vectors is not None]:
        yield catalogue.SPECTRAL, fmean(vectors.before for vectors in measured), ("before",)
        yield catalogue.SPECTRAL, fmean(vectors.after for vectors in measured), ("after",)


def _update_gauges(cosines: UpdateCosines | None) -> Iterator[Gauge]:
    if cosines is None:
        return
    if cosines.norm is not None:
        yield catalogue.UPDATE_NORM, cosines.norm, ()
    for label, cosine in (("fused", cosines.fused), ("previous", cosines.previous), ("clients", cosines.clients_mean)):
        if cosine is not None:
            yield catalogue.UPDATE_COSINE, cosine, (label,)


def _probe_gauges(probe: ServerProbe) -> Iterator[Gauge]:
    for between, paths in (("clients", probe.pairs), ("fused", probe.fused)):
        if not paths:
            continue
        for measure, barrier in LOSS_BARRIERS.items():
            yield catalogue.PROBE_BARRIER, highest_barrier(barrier, paths), (between, measure)
        falls = (barrier_height(accuracy_barrier, probed.path, probed.path.correct_after) for probed in paths)
        yield catalogue.PROBE_ACCURACY_BARRIER, max(falls), (between,)
    for model, accuracy in probe_accuracies(probe).items():
        yield catalogue.PROBE_ACCURACY, accuracy, (model,)
