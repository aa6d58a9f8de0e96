"""Where models lie, by round: a chart for each thing that was measured beside the barrier to the anchor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedbasin.server.report.charts import figures
from fedbasin.server.report.charts.chart import Bars, Line, rounds_axis
from fedbasin.server.report.charts.figures import Words
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.charts.text import duration
from fedbasin.server.report.reported_run import Run


@dataclass(frozen=True)
class Chart:
    """What is drawn together.

    Attributes:
        title: heading.
        note: what is drawn, and in which unit.
        lines: the label of each, the measure of `summary.Round` and its style.
    """

    title: str
    note: str
    lines: tuple[tuple[str, str, str], ...]


CHARTS = (
    Chart(
        "From the new global model to the clients",
        "Loss barrier, and the gap in the middle of the way, nats: below 0 mixing both would help.",
        (
            ("barrier", "fused_barrier_loss", "c1"),
            ("gap in the middle", "fused_midpoint_gap_loss", "c2"),
        ),
    ),
    Chart(
        "Cosine of updates",
        "Of the clients’ updates with what the new model moved by, with what the round before moved by, and with "
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
        "With the anchor, over the layers that a small budget pays for: 1 for the same directions, about 0 for strangers.",
        (
            ("as trained", "spectral_alignment_ratio.before", "before"),
            ("aligned", "spectral_alignment_ratio.after", "after"),
        ),
    ),
    Chart(
        "Hidden variance",
        "Of the new model’s layers over the clients’ on the same data: far below 1 the signal fades.",
        (
            ("lowest layer", "variance_ratio.lowest", "c1"),
            ("mean of layers", "variance_ratio.mean", "c2"),
        ),
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
        "The ensemble of the kept models is the ceiling of what fusing them could reach.",
        (
            ("new global model", "probe_accuracy_ratio.fused", "c1"),
            ("clients, mean", "probe_accuracy_ratio.clients", "c2"),
            ("ensemble", "probe_accuracy_ratio.ensemble", "c3"),
        ),
    ),
)


def basin(runs: Sequence[Run]) -> Html:
    """The charts for which there is something to draw."""
    drawn = [figure for chart in CHARTS if (figure := _drawn(chart, runs))]
    if not drawn:
        return tag("p", "These rounds measured nothing of it.", class_="note")
    return tag("div", *drawn, class_="grid pairs")


def probes(run: Run) -> Html:
    """Seconds of probing by round; nothing where nothing was probed."""
    seconds = [
        Bars("clients together", [one.probing.client_seconds for one in run.rounds], "c1"),
        Bars("server", [one.probing.server_seconds for one in run.rounds], "c2"),
    ]
    if not any(height for bars in seconds for height in bars.heights):
        return Html()
    words = Words(
        "Seconds of probing", "Paths, variances, directions and the probe set: what looking costs."
    )
    return figures.bars(words, seconds, [one.number for one in run.rounds], duration)


def _drawn(chart: Chart, runs: Sequence[Run]) -> Html:
    lines = [
        Line(
            f"{run.name}, {label}" if len(runs) > 1 else label,
            [(one.number, one.measures.get(measure, math.nan)) for one in run.rounds],
            f"{style} dashed" if index else style,
        )
        for index, run in enumerate(runs)
        for label, measure, style in chart.lines
    ]
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return Html()
    first = min(run.rounds[0].number for run in runs)
    across = rounds_axis(first, max(run.newest.number for run in runs))
    return join([figures.curves(Words(chart.title, chart.note), lines, across)])
