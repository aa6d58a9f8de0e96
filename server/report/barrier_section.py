"""The section on paths: loss and accuracy on the straight line from a global model to the clients, in one round."""

from collections.abc import Sequence

from fedbasin.proto.report import PathSums, RoundReport
from fedbasin.server.report.charts.chart import Point, Polyline, Scale
from fedbasin.server.report.charts.figures import Caption, line_figure
from fedbasin.server.report.charts.markup import Html, join, tag


def draw_anchor_path(report: RoundReport, prefix: str = "") -> Html:
    """Draw both curves from the anchor to the clients, as trained and as aligned.

    Args:
        report: report of the round.
        prefix: words before each heading, such as the name of the run.
    """
    sums = report.path
    if not (sums and sums.points and sums.examples):
        return tag("p", f"{_round_title(report, prefix)} evaluated no path.", class_="note")
    data = f"{sums.examples:,.0f} examples of the clients’ own"
    panels = (
        ("loss", f"Mean in nats, {data}.", sums.loss_before, sums.loss_after),
        ("accuracy", f"Share of {data}.", sums.correct_before, sums.correct_after),
    )
    return join(
        line_figure(
            Caption(f"{_round_title(report, prefix)}: {name}", note, "anchor (0) to client (1)"),
            [
                Polyline(label, _means(sums, curve), style)
                for label, curve, style in (("as trained", as_trained, "before"), ("aligned", aligned, "after"))
                if curve
            ],
            Scale(0, 1),
        )
        for name, note, as_trained, aligned in panels
        if as_trained or aligned
    )


def draw_fused_path(report: RoundReport, prefix: str = "") -> Html:
    """Draw both curves from the new global model to the clients' models; nothing where no client evaluated them.

    Args:
        report: report of the round.
        prefix: words before each heading, such as the name of the run.
    """
    sums = report.fused_path
    if not (sums and sums.points and sums.examples):
        return Html()
    title = f"{_round_title(report, prefix)}: new model to clients"
    data = f"{sums.examples:,.0f} examples of {sums.clients} clients"
    panels = (
        ("loss", f"Mean in nats, {data}.", sums.loss_after),
        ("accuracy", f"Share of {data}.", sums.correct_after),
    )
    return join(
        line_figure(
            Caption(f"{title}, {name}", note, "new model (0) to client (1)"),
            [Polyline(name, _means(sums, curve), "after")],
            Scale(0, 1),
        )
        for name, note, curve in panels
        if curve
    )


def _round_title(report: RoundReport, prefix: str) -> str:
    return f"{prefix}{'round' if prefix else 'Round'} {report.round}"


def _means(path: PathSums, sums: Sequence[float]) -> list[Point]:
    # Not strict: a report may come from anyone, with curves of another length than its points.
    return [(t, y / path.examples) for t, y in zip(path.points, sums, strict=False)]
