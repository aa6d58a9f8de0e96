"""Loss and accuracy on the straight way from the anchor to the clients, in one round."""

from collections.abc import Sequence

from fedbasin.proto.fedbasin_pb2 import PathSums, RoundReport
from fedbasin.server.report.charts import figures
from fedbasin.server.report.charts.chart import Axis, Line, Point
from fedbasin.server.report.charts.figures import Words
from fedbasin.server.report.charts.markup import Html, join, tag


def path(report: RoundReport, whose: str = "") -> Html:
    """Both curves, as trained and as aligned.

    Args:
        report: the round's.
        whose: stands before each heading.
    """
    sums = report.path
    if not (sums.points and sums.examples):
        return tag("p", f"{whose}{_round(report, whose)} evaluated no path.", class_="note")
    counted = f"{sums.examples:,.0f} examples of the clients’ own"
    panels = (
        ("loss", f"Mean in nats, {counted}.", sums.loss_before, sums.loss_after),
        ("accuracy", f"Share of {counted}.", sums.correct_before, sums.correct_after),
    )
    return join(
        figures.curves(
            Words(f"{whose}{_round(report, whose)}: {name}", note, "anchor (0) to client (1)"),
            _lines(sums, before, after),
            Axis(0, 1),
        )
        for name, note, before, after in panels
        if before or after
    )


def fused(report: RoundReport, whose: str = "") -> Html:
    """Both curves on the way from the new global model to the clients' own; nothing where nobody walked it."""
    sums = report.fused_path
    if not (sums.points and sums.examples):
        return Html()
    number = f"{whose}{_round(report, whose)}"
    counted = f"{sums.examples:,.0f} examples of {sums.clients} clients"
    panels = (
        ("loss", f"Mean in nats, {counted}.", sums.loss_after),
        ("accuracy", f"Share of {counted}.", sums.correct_after),
    )
    return join(
        figures.curves(
            Words(f"{number}: new model to clients, {name}", note, "new model (0) to client (1)"),
            [Line(name, _means(sums, values), "after")],
            Axis(0, 1),
        )
        for name, note, values in panels
        if values
    )


def _round(report: RoundReport, whose: str) -> str:
    return f"{'round' if whose else 'Round'} {report.round}"


def _lines(path: PathSums, before: Sequence[float], after: Sequence[float]) -> list[Line]:
    drawn = (("as trained", before, "before"), ("aligned", after, "after"))
    return [Line(label, _means(path, sums), when) for label, sums, when in drawn if sums]


def _means(path: PathSums, sums: Sequence[float]) -> list[Point]:
    return [(t, y / path.examples) for t, y in zip(path.points, sums, strict=False)]
