"""Charts with all that belongs to them: a heading, an explanation, a sentence for screen readers, a table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedbasin.server.report.charts.chart import Bars, Polyline, Scale, bar_chart, line_chart
from fedbasin.server.report.charts.html_table import disclose, html_table
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.charts.text import number


@dataclass(frozen=True)
class Caption:
    """The words around a chart.

    Attributes:
        title: heading.
        note: explanation with the unit.
        across: name of the x scale.
    """

    title: str
    note: str
    across: str = "round"


def figure(title: str, note: str, *content: Html) -> Html:
    """Return a chart with its heading and its explanation."""
    caption = tag("figcaption", tag("h3", title), tag("p", note) if note else Html())
    return tag("figure", caption, join(content))


def line_figure(
    caption: Caption, lines: Sequence[Polyline], across: Scale, show: Callable[[float], str] = number
) -> Html:
    """Return a chart of lines over one x scale, with its table."""
    chart = line_chart(lines, across, caption.across, _describe_lines(caption, lines), show)
    by_line = [dict(line.points) for line in lines]
    places = sorted({x for points in by_line for x in points})
    rows = ((across.show(x), *(show(points.get(x, math.nan)) for points in by_line)) for x in places)
    head = (caption.across, *(line.label for line in lines))
    table = html_table(caption.title, head, rows)
    return figure(caption.title, caption.note, chart, disclose(table, caption.title))


def bar_figure(caption: Caption, stack: Sequence[Bars], rounds: Sequence[int], show: Callable[[float], str]) -> Html:
    """Return a chart of stacked bars by round, with its table; nothing where there is nothing to stack."""
    if not stack:
        return Html()
    chart = bar_chart(stack, rounds[0], _describe_bars(caption, stack, show), show)
    columns = ([show(height) for height in bars.heights] for bars in stack)
    rows = list(zip(rounds, *columns, strict=True))
    table = html_table(caption.title, (caption.across, *(bars.label for bars in stack)), rows)
    return figure(caption.title, caption.note, chart, disclose(table, caption.title))


def _describe_lines(caption: Caption, lines: Sequence[Polyline]) -> str:
    parts = []
    for line in lines:
        if ys := [y for _, y in line.points if math.isfinite(y)]:
            ends = f"from {number(ys[0])} to {number(ys[-1])}"
            parts.append(f"{line.label} {ends}, highest {number(max(ys))}")
    return f"Line chart. {caption.title}, by {caption.across}: {'; '.join(parts)}."


def _describe_bars(caption: Caption, stack: Sequence[Bars], show: Callable[[float], str]) -> str:
    parts = (f"{bars.label} {show(sum(bars.heights))} in all" for bars in stack)
    return f"Bar chart. {caption.title}, by {caption.across}: {'; '.join(parts)}."
