"""What a round's report says in numbers: the gauges of the catalogue, and the arithmetic behind them.

Means are over the accepted clients. What no client measured has no number, so that its gauge keeps its value.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import TypeAlias

from fedbasin.proto.fedbasin_pb2 import (
    AlignmentReport,
    ClientReport,
    Drift,
    PathSums,
    ProbedPath,
    RoundReport,
    ServerProbe,
)
from fedbasin.server.observe import metric_catalogue as of
from fedbasin.strategies.diagnostics.barrier import (
    Curve,
    accuracy_barrier,
    area,
    linear_barrier,
    mean_barrier,
    midpoint_gap,
)
from fedbasin.strategies.round.outcomes import Outcome

Gauge: TypeAlias = tuple[of.Metric, float, tuple[str, ...]]
Barrier: TypeAlias = Callable[[Curve, Curve], float]

LOSS_BARRIERS: dict[str, Barrier] = {
    "linear": linear_barrier,
    "above_mean": mean_barrier,
    "midpoint": midpoint_gap,
    "area": area,
}


def gauges(report: RoundReport) -> Iterator[Gauge]:
    """Every gauge of a round that came to its end, with its labels after the recipe."""
    yield of.ROUND, report.round, ()
    yield of.FINISHED, report.finished.seconds + report.finished.nanos / 1e9, ()
    yield of.LAST_SECONDS, report.seconds, ()
    yield of.MEMORY, report.peak_rss_bytes, ()
    yield from _barriers(report.path)
    yield from _fused(report.fused_path)
    yield from _alignments(alignments(report))
    yield from _drift(report.drift)
    yield from _variance([entry.ratio for entry in report.variance])
    yield from _probe(report.probe)


def brief(report: RoundReport) -> Iterator[Gauge]:
    """Those beside the barrier for which no space has to be looked at: spaces are most of a report."""
    yield from _fused(report.fused_path)
    yield from _spectral(alignments(report))
    yield from _drift(report.drift)
    yield from _variance([entry.ratio for entry in report.variance])
    yield from _probe(report.probe)


def probing(report: RoundReport) -> tuple[float, float, int]:
    """Seconds of all clients together, seconds of the server, and bytes of both, that probing took."""
    clients = [client for stage in report.stages for client in stage.clients]
    told = [c for c in clients if 0 <= c.probe_seconds < math.inf]
    return (
        sum(client.probe_seconds for client in told),
        report.drift.seconds + report.probe.seconds,
        sum(client.probe_bytes for client in told) + report.probe.spooled_bytes,
    )


def height(barrier: Barrier, path: PathSums, sums: Sequence[float]) -> float:
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


def highest(barrier: Barrier, paths: Iterable[ProbedPath]) -> float:
    """The largest loss barrier of some paths; NaN where there is none."""
    found = [height(barrier, one.path, one.path.loss_after) for one in paths]
    return max((value for value in found if math.isfinite(value)), default=math.nan)


def ends(probe: ServerProbe) -> dict[str, float]:
    """Accuracy on the server's probe set of the fused model, of the clients' (mean), and of their ensemble."""
    paths = [one.path for one in probe.fused if one.path.correct_after and one.path.examples]
    if not paths:
        return {}
    return {
        "fused": paths[0].correct_after[0] / paths[0].examples,
        "clients": fmean(path.correct_after[-1] / path.examples for path in paths),
        "ensemble": probe.ensemble_accuracy,
    }


def _barriers(path: PathSums) -> Iterator[Gauge]:
    for when, loss, correct in (
        ("before", path.loss_before, path.correct_before),
        ("after", path.loss_after, path.correct_after),
    ):
        if loss and path.examples:
            yield of.BARRIER_LOSS, height(linear_barrier, path, loss), (when,)
        if correct and path.examples:
            yield of.BARRIER_ACCURACY, height(accuracy_barrier, path, correct), (when,)


def _fused(path: PathSums) -> Iterator[Gauge]:
    if path.loss_after and path.examples:
        yield of.FUSED_BARRIER, height(linear_barrier, path, path.loss_after), ()
        yield of.FUSED_GAP, height(midpoint_gap, path, path.loss_after), ()


def _alignments(moves: Sequence[AlignmentReport]) -> Iterator[Gauge]:
    if not moves:
        return
    spaces = [space for move in moves for space in move.spaces]
    yield of.GAIN, sum(space.gain for space in spaces) / len(moves), ()
    yield of.DISTANCE, fmean(move.distance_before for move in moves), ("before",)
    yield of.DISTANCE, fmean(move.distance_after for move in moves), ("after",)
    if spaces:
        yield of.CERTIFIED, fmean(space.certified for space in spaces), ()
    if errors := [move.endpoint_error for move in moves if move.HasField("endpoint_error")]:
        yield of.ENDPOINT_ERROR, max(errors), ()
    yield from _spectral(moves)
    if stayed := [space.fixed_points for space in spaces if space.HasField("fixed_points")]:
        yield of.FIXED_POINTS, fmean(stayed), ()
    if turning := [space for space in spaces if space.HasField("skew_before")]:
        yield of.SKEW, fmean(space.skew_before for space in turning), ("before",)
        yield of.SKEW, fmean(space.skew_after for space in turning), ("after",)


def _spectral(moves: Sequence[AlignmentReport]) -> Iterator[Gauge]:
    if found := [move.spectral for move in moves if move.HasField("spectral")]:
        yield of.SPECTRAL, fmean(one.before for one in found), ("before",)
        yield of.SPECTRAL, fmean(one.after for one in found), ("after",)


def _drift(drift: Drift) -> Iterator[Gauge]:
    if drift.HasField("norm"):
        yield of.UPDATE_NORM, drift.norm, ()
    if drift.HasField("fused"):
        yield of.UPDATE_COSINE, drift.fused, ("fused",)
    if drift.HasField("previous"):
        yield of.UPDATE_COSINE, drift.previous, ("previous",)
    if drift.HasField("clients_mean"):
        yield of.UPDATE_COSINE, drift.clients_mean, ("clients",)


def _variance(ratios: Sequence[float]) -> Iterator[Gauge]:
    if ratios:
        yield of.VARIANCE, min(ratios), ("lowest",)
        yield of.VARIANCE, fmean(ratios), ("mean",)


def _probe(probe: ServerProbe) -> Iterator[Gauge]:
    for between, paths in (("clients", probe.pairs), ("fused", probe.fused)):
        for measure, barrier in LOSS_BARRIERS.items():
            if paths:
                yield of.PROBE_BARRIER, highest(barrier, paths), (between, measure)
        falls = [height(accuracy_barrier, one.path, one.path.correct_after) for one in paths]
        if falls:
            yield of.PROBE_ACCURACY_BARRIER, max(falls), (between,)
    for whose, share in ends(probe).items():
        yield of.PROBE_ACCURACY, share, (whose,)
