"""Charts with all that belongs to them: a heading, what they mean, a sentence for screen readers, a table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedbasin.server.report.charts.chart import Axis, Bars, Line, bar_chart, line_chart
from fedbasin.server.report.charts.html_table import disclosed, table
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.charts.text import number


@dataclass(frozen=True)
class Words:
    """What is written around a chart.

    Attributes:
        title: heading.
        note: what is drawn, and in which unit.
        across: name of the x axis.
    """

    title: str
    note: str
    across: str = "round"


def figure(title: str, note: object, *content: Html) -> Html:
    """A chart with its heading and what it means."""
    caption = tag("figcaption", tag("h3", title), tag("p", note) if note else Html())
    return tag("figure", caption, join(content))


def curves(
    words: Words, lines: Sequence[Line], across: Axis, show: Callable[[float], str] = number
) -> Html:
    """Lines over one x axis."""
    chart = line_chart(lines, across, words.across, _spoken_lines(words, lines), show)
    by_line = [dict(line.points) for line in lines]
    places = sorted({x for points in by_line for x in points})
    rows = (
        (across.show(x), *(show(points.get(x, math.nan)) for points in by_line)) for x in places
    )
    numbers = table(words.title, (words.across, *(line.label for line in lines)), rows)
    return figure(words.title, words.note, chart, disclosed(numbers, words.title))


def bars(
    words: Words, stack: Sequence[Bars], rounds: Sequence[int], show: Callable[[float], str]
) -> Html:
    """Stacked bars by round; nothing where there is nothing to stack."""
    if not stack:
        return Html()
    chart = bar_chart(stack, rounds[0], _spoken_bars(words, stack, show), show)
    columns = ([show(height) for height in one.heights] for one in stack)
    rows = list(zip(rounds, *columns, strict=True))
    numbers = table(words.title, (words.across, *(one.label for one in stack)), rows)
    return figure(words.title, words.note, chart, disclosed(numbers, words.title))


def _spoken_lines(words: Words, lines: Sequence[Line]) -> str:
    parts = []
    for line in lines:
        if ys := [y for _, y in line.points if math.isfinite(y)]:
            ends = f"from {number(ys[0])} to {number(ys[-1])}"
            parts.append(f"{line.label} {ends}, highest {number(max(ys))}")
    return f"Line chart. {words.title}, by {words.across}: {'; '.join(parts)}."


def _spoken_bars(words: Words, stack: Sequence[Bars], show: Callable[[float], str]) -> str:
    parts = (f"{one.label} {show(sum(one.heights))} in all" for one in stack)
    return f"Bar chart. {words.title}, by {words.across}: {'; '.join(parts)}."
