"""The section on the position of models: a chart by round for each measure beside the barrier to the anchor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedbasin.server.report.charts.chart import Bars, Polyline, rounds_scale
from fedbasin.server.report.charts.figures import Caption, bar_figure, line_figure
from fedbasin.server.report.charts.markup import Html, tag
from fedbasin.server.report.charts.text import duration
from fedbasin.server.report.reported_run import ReportedRun


@dataclass(frozen=True)
class Chart:
    """A chart of several measures by round.

    Attributes:
        title: heading.
        note: explanation with the unit.
        lines: label, measure of a `RoundSummary` and style of each line.
    """

    title: str
    note: str
    lines: tuple[tuple[str, str, str], ...]


CHARTS = (
    Chart(
        "From the new global model to the clients",
        "Loss barrier, and the gap in the middle of the path, nats: below 0 mixing both would help.",
        (("barrier", "fused_barrier_loss", "c1"), ("gap in the middle", "fused_midpoint_gap_loss", "c2")),
    ),
    Chart(
        "Cosine of updates",
        "Of the clients’ updates with the movement of the new model, with the movement of the round before, and with "
        "one another. At 0 they are at right angles.",
        (
            ("with the new movement", "update_cosine.fused", "c1"),
            ("with the round before", "update_cosine.previous", "c2"),
            ("between clients", "update_cosine.clients", "c3"),
        ),
    ),
    Chart("Length of updates", "L2, mean of clients.", (("update", "update_norm", "c1"),)),
    Chart(
        "Singular vectors in common",
        "With the anchor, over the layers that a small budget pays for: 1 for the same directions, about 0 for "
        "independent models.",
        (
            ("as trained", "spectral_alignment_ratio.before", "before"),
            ("aligned", "spectral_alignment_ratio.after", "after"),
        ),
    ),
    Chart(
        "Hidden variance",
        "Of the new model’s layers over the clients’ on the same data: far below 1, activations collapse.",
        (("lowest layer", "variance_ratio.lowest", "c1"), ("mean of layers", "variance_ratio.mean", "c2")),
    ),
    Chart(
        "Barriers on the server’s probe set",
        "The highest between the clients whose models were kept, and from the new model to them, nats.",
        (
            ("between clients", "probe_barrier_loss.clients.linear", "c1"),
            ("from the new model", "probe_barrier_loss.fused.linear", "c2"),
        ),
    ),
    Chart(
        "Accuracy on the server’s probe set",
        "The ensemble of the kept models is about the best that fusing them could reach.",
        (
            ("new global model", "probe_accuracy_ratio.fused", "c1"),
            ("clients, mean", "probe_accuracy_ratio.clients", "c2"),
            ("ensemble", "probe_accuracy_ratio.ensemble", "c3"),
        ),
    ),
)


def draw_measures(runs: Sequence[ReportedRun]) -> Html:
    """Draw the charts for which something was measured."""
    figures = [figure for chart in CHARTS if (figure := _draw_chart(chart, runs))]
    if not figures:
        return tag("p", "These rounds measured none of this.", class_="note")
    return tag("div", *figures, class_="grid pairs")


def draw_probe_cost(run: ReportedRun) -> Html:
    """Draw the seconds of diagnostics by round; nothing where nothing was measured."""
    seconds = [
        Bars("clients together", [r.probe_cost.client_seconds for r in run.rounds], "c1"),
        Bars("server", [r.probe_cost.server_seconds for r in run.rounds], "c2"),
    ]
    if not any(height for bars in seconds for height in bars.heights):
        return Html()
    caption = Caption(
        "Seconds of probing", "The cost of diagnostics: paths, variances, cosines, singular vectors and the probe set."
    )
    return bar_figure(caption, seconds, [r.number for r in run.rounds], duration)


def _draw_chart(chart: Chart, runs: Sequence[ReportedRun]) -> Html:
    lines = [
        Polyline(
            f"{run.name}, {label}" if len(runs) > 1 else label,
            [(r.number, r.measures.get(measure, math.nan)) for r in run.rounds],
            f"{style} dashed" if index else style,
        )
        for index, run in enumerate(runs)
        for label, measure, style in chart.lines
    ]
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return Html()
    start = min(run.rounds[0].number for run in runs)
    across = rounds_scale(start, max(run.newest.number for run in runs))
    return line_figure(Caption(chart.title, chart.note), lines, across)
