"""Charts as SVG, drawn for any width: positions are percentages, text and strokes keep their size.

Colours come from the style sheet by class, so that a chart follows dark, light and print. Nothing here needs a
script or an inline style.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.charts.text import number

Point: TypeAlias = tuple[float, float]

_LARGEST = 1e100  # beyond it a number is drawn as a gap: it says no more than an overflow
_INNER = 1000  # units of the stretched drawing inside
_DOTS = 40  # over more rounds, lines are drawn without dots


@dataclass(frozen=True)
class Line:
    """A curve; NaN leaves a gap.

    Attributes:
        label: for the legend.
        points: x and y, x rising.
        style: classes of the style sheet.
    """

    label: str
    points: Sequence[Point]
    style: str


@dataclass(frozen=True)
class Bars:
    """One colour of a stack of bars: a height for each round."""

    label: str
    heights: Sequence[float]
    style: str


@dataclass(frozen=True)
class Axis:
    """A straight scale from low to high."""

    low: float
    high: float
    show: Callable[[float], str] = number

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int = 4) -> list[float]:
        """Round numbers within the scale, about so many."""
        step = _step((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def axis(values: Sequence[float], show: Callable[[float], str] = number) -> Axis:
    """A scale that holds all finite values, with round ends; zero is one of them where it is near."""
    drawn = [value for value in values if _drawable(value)] or [0.0, 1.0]
    low, high = min(drawn), max(drawn)
    if high - low < 1e-9 * max(abs(low), abs(high)) or high - low < 1 / _LARGEST:
        low, high = min(low, 0.0), max(high, 0.0)  # one value: seen from zero
    elif 0 <= low <= 0.6 * high:
        low = 0.0
    step = _step(max((high - low) / 4, 1 / _LARGEST))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, max(last, first + 1) * step, show)


def line_chart(
    lines: Sequence[Line],
    across: Axis,
    x_label: str,
    description: str,
    show: Callable[[float], str] = number,
) -> Html:
    """Curves over one x axis, with a legend where there is more than one."""
    up = axis([y for line in lines for _, y in line.points], show)
    drawn = join(_curve(line, across, up) for line in lines)
    few = across.high - across.low <= _DOTS
    dots = join(_dots(line, across, up) for line in lines if few)
    keys = [(line.label, line.style) for line in lines] if len(lines) > 1 else []
    return join([_frame(across, up, x_label, description, drawn, dots), legend(keys, "line")])


def bar_chart(
    stack: Sequence[Bars],
    first: int,
    description: str,
    show: Callable[[float], str] = number,
) -> Html:
    """Stacked bars, one stack a round, from round `first` on."""
    stack = [
        replace(bars, heights=[h if _drawable(h) else 0.0 for h in bars.heights]) for bars in stack
    ]
    totals = [sum(heights) for heights in zip(*(bars.heights for bars in stack), strict=True)]
    across = Axis(first - 0.5, first + len(totals) - 0.5, lambda value: f"{value:.0f}")
    up = axis([0.0, *totals], show)
    drawn, floor = [], [0.0] * len(totals)
    for bars in stack:
        drawn.append(_bars(bars, floor, up))
        floor = [low + height for low, height in zip(floor, bars.heights, strict=True)]
    frame = _frame(across, up, "round", description, join(drawn), Html())
    return join([frame, legend([(bars.label, bars.style) for bars in stack], "swatch")])


def legend(keys: Sequence[tuple[str, str]], kind: str) -> Html:
    """What the colours mean."""
    if not keys:
        return Html()
    items = (
        tag("li", tag("svg", _key(kind, style), class_=f"key {kind}", aria_hidden="true"), label)
        for label, style in keys
    )
    return tag("ul", *items, class_="legend")


def _key(kind: str, style: str) -> Html:
    if kind == "line":
        return tag("line", x1=0, y1=6, x2=22, y2=6, class_=f"line {style}")
    return tag("rect", width=12, height=12, rx=2, class_=f"fill {style}")


def rounds_axis(first: int, last: int) -> Axis:
    """The x axis of what is drawn by round."""
    return Axis(first, max(last, first + 1), lambda value: f"{value:.0f}")


def _frame(across: Axis, up: Axis, x_label: str, description: str, drawn: Html, over: Html) -> Html:
    whole = [tick for tick in across.ticks(6) if x_label != "round" or tick == round(tick)]
    horizontal = (_level(up.place(tick), up.show(tick)) for tick in up.ticks())
    vertical = (_mark(across.place(tick), across.show(tick)) for tick in whole)
    label = tag("text", x_label, x="100%", y="100%", dy="2.9em", text_anchor="end", class_="axis")
    inner = tag(
        "svg",
        drawn,
        viewBox=f"0 0 {_INNER} {_INNER}",
        preserveAspectRatio="none",
        width="100%",
        height="100%",
        class_="inner",
    )
    picture = tag(
        "svg",
        *horizontal,
        *vertical,
        label,
        inner,
        over,
        class_="canvas",
        role="img",
        aria_label=description,
    )
    return tag("div", picture, class_="plot")


def _level(place: float, text: str) -> Html:
    y = _percent(1 - place)
    line = tag("line", x1=0, x2="100%", y1=y, y2=y, class_="grid")
    return join([line, tag("text", text, x=0, y=y, dx=-8, dy="0.32em", text_anchor="end")])


def _mark(place: float, text: str) -> Html:
    return tag("text", text, x=_percent(place), y="100%", dy="1.55em", text_anchor="middle")


def _curve(line: Line, across: Axis, up: Axis) -> Html:
    steps, pen = [], "M"
    for x, y in line.points:
        if not _drawable(y):
            pen = "M"
            continue
        steps.append(f"{pen}{_inner(across.place(x))} {_inner(1 - up.place(y))}")
        pen = "L"
    return tag("path", d="".join(steps), class_=f"line {line.style}")


def _dots(line: Line, across: Axis, up: Axis) -> Html:
    return join(
        tag(
            "circle",
            tag("title", f"{line.label}: {up.show(y)} at {across.show(x)}"),
            cx=_percent(across.place(x)),
            cy=_percent(1 - up.place(y)),
            r=3,
            class_=f"fill {line.style}",
        )
        for x, y in line.points
        if _drawable(y)
    )


def _bars(bars: Bars, floor: Sequence[float], up: Axis) -> Html:
    pitch = _INNER / len(floor)
    width = pitch if len(floor) > 80 else min(0.72 * pitch, 60)
    steps = []
    for index, (low, height) in enumerate(zip(floor, bars.heights, strict=True)):
        if height:
            left = f"{index * pitch + (pitch - width) / 2:.4g}"
            top, tall = _inner(1 - up.place(low + height)), _inner(up.place(height))
            steps.append(f"M{left} {top}h{width:.4g}v{tall}h-{width:.4g}z")
    return tag("path", d="".join(steps), class_=f"fill {bars.style}")


def _drawable(value: float) -> bool:
    return abs(value) < _LARGEST  # NaN is not


def _step(rough: float) -> float:
    """The next of 1, 2, 5, 10 ... at or above."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))


def _inner(place: float) -> str:
    return f"{place * _INNER:.4g}"


def _percent(place: float) -> str:
    return f"{100 * place:.4g}%"
