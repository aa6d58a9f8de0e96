"""The picture of a barrier: one HTML file with the charts of the reports, which needs nothing else."""

from fedbasin.server.files.data.file_barrier import FileBarrier
from fedbasin.server.report.charts.chart import Polyline, Scale
from fedbasin.server.report.charts.figures import Caption, line_figure
from fedbasin.server.report.charts.markup import Html, tag, trusted
from fedbasin.server.report.charts.text import number
from fedbasin.server.report.document import read_style, render_document, theme_choice, title_heading


def render_page(result: FileBarrier) -> str:
    """Return the page with both paths."""
    before, after = result.barriers
    note = f"barrier {number(before.linear)} → {number(after.linear)}"
    examples = f"{result.before.examples:,.0f} examples"
    charts = [_draw("Loss", f"Mean of {examples}.", result, "mean_loss")]
    if result.before.accuracy:
        charts.append(_draw("Accuracy", f"Share of {examples}.", result, "accuracy"))
    ends = tag("p", f"{result.anchor} (0) to {result.model} (1)", class_="note")
    body = (
        tag("header", title_heading("Barrier", note), theme_choice()),
        tag("main", ends, tag("div", *charts, class_="grid pairs"), id="main"),
    )
    return render_document("Barrier · fedbasin", tag("style", trusted(read_style())), *body)


def _draw(title: str, note: str, result: FileBarrier, curve: str) -> Html:
    lines = [
        Polyline(label, list(zip(path.points, getattr(path, curve), strict=True)), style)
        for label, path, style in (("as stored", result.before, "before"), ("aligned", result.after, "after"))
    ]
    return line_figure(Caption(title, note, "first model (0) to second (1)"), lines, Scale(0, 1))
