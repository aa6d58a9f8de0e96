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

_LARGEST = 1e100  # a larger number is drawn as a gap: it tells no more than an overflow
_INNER = 1000  # units of the stretched drawing inside the frame
_DOTS = 40  # over more rounds, lines are drawn without dots


@dataclass(frozen=True)
class Polyline:
    """A curve; NaN leaves a gap.

    Attributes:
        label: text in the legend.
        points: pairs of x and y, x rising.
        style: classes of the style sheet.
    """

    label: str
    points: Sequence[Point]
    style: str


@dataclass(frozen=True)
class Bars:
    """One colour of a stack of bars, with a height for each round."""

    label: str
    heights: Sequence[float]
    style: str


@dataclass(frozen=True)
class Scale:
    """A linear scale from low to high."""

    low: float
    high: float
    show: Callable[[float], str] = number

    def place(self, value: float) -> float:
        """Return the position of a value, from 0 at the low end to 1 at the high end."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int = 4) -> list[float]:
        """Return round numbers within the scale, about as many as given."""
        step = _round_step((self.high - self.low) / about)
        start, stop = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(start, stop + 1)]


def fit_scale(values: Sequence[float], show: Callable[[float], str] = number) -> Scale:
    """Return a scale with round ends that holds all finite values, and zero where it is near."""
    drawn = [value for value in values if _drawable(value)] or [0.0, 1.0]
    low, high = min(drawn), max(drawn)
    # Without an extent of their own, values are shown against zero; rounding errors are not an extent.
    if high - low < 1e-9 * max(abs(low), abs(high)) or high - low < 1 / _LARGEST:
        low, high = min(low, 0.0), max(high, 0.0)
    elif 0 <= low <= 0.6 * high:
        low = 0.0
    step = _round_step(max((high - low) / 4, 1 / _LARGEST))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(start * step, max(stop, start + 1) * step, show)


def rounds_scale(start: int, stop: int) -> Scale:
    """Return the x scale of a chart by round."""
    return Scale(start, max(stop, start + 1), lambda value: f"{value:.0f}")


def line_chart(
    lines: Sequence[Polyline], across: Scale, x_label: str, description: str, show: Callable[[float], str] = number
) -> Html:
    """Draw curves over one x scale, with a legend where there is more than one."""
    up = fit_scale([y for line in lines for _, y in line.points], show)
    curves = join(_draw_curve(line, across, up) for line in lines)
    # Dots carry the numbers as tooltips; more of them than this hide the line.
    few = across.high - across.low <= _DOTS
    dots = join(_draw_dots(line, across, up) for line in lines if few)
    keys = [(line.label, line.style) for line in lines] if len(lines) > 1 else []
    return join([_frame(across, up, x_label, description, curves, dots), legend(keys, "line")])


def bar_chart(stack: Sequence[Bars], start: int, description: str, show: Callable[[float], str] = number) -> Html:
    """Draw stacked bars, one stack a round, from round `start` on."""
    stack = [replace(bars, heights=[h if _drawable(h) else 0.0 for h in bars.heights]) for bars in stack]
    totals = [sum(heights) for heights in zip(*(bars.heights for bars in stack), strict=True)]
    # Half a round on both sides, so that the outer bars are whole.
    across = Scale(start - 0.5, start + len(totals) - 0.5, lambda value: f"{value:.0f}")
    up = fit_scale([0.0, *totals], show)
    layers, floor = [], [0.0] * len(totals)
    for bars in stack:
        layers.append(_draw_bars(bars, floor, up))
        floor = [low + height for low, height in zip(floor, bars.heights, strict=True)]
    frame = _frame(across, up, "round", description, join(layers), Html())
    return join([frame, legend([(bars.label, bars.style) for bars in stack], "swatch")])


def legend(keys: Sequence[tuple[str, str]], kind: str) -> Html:
    """Return the legend of the colours.

    Args:
        keys: label and style of each entry.
        kind: "line" or "swatch".
    """
    if not keys:
        return Html()
    items = []
    for label, style in keys:
        if kind == "line":
            mark = tag("line", x1=0, y1=6, x2=22, y2=6, class_=f"line {style}")
        else:
            mark = tag("rect", width=12, height=12, rx=2, class_=f"fill {style}")
        key = tag("svg", mark, class_=f"key {kind}", aria_hidden="true")
        items.append(tag("li", key, label))
    return tag("ul", *items, class_="legend")


def _frame(across: Scale, up: Scale, x_label: str, description: str, drawing: Html, overlay: Html) -> Html:
    """Return a chart with its scales.

    Args:
        across: the x scale.
        up: the y scale.
        x_label: name of the x scale.
        description: text for screen readers.
        drawing: shapes that are stretched with the frame.
        overlay: shapes that keep their size.
    """
    whole = [tick for tick in across.ticks(6) if x_label != "round" or tick == round(tick)]
    horizontal = (_grid_line(up.place(tick), up.show(tick)) for tick in up.ticks())
    vertical = (_tick_label(across.place(tick), across.show(tick)) for tick in whole)
    label = tag("text", x_label, x="100%", y="100%", dy="2.9em", text_anchor="end", class_="axis")
    inner = tag(
        "svg",
        drawing,
        viewBox=f"0 0 {_INNER} {_INNER}",
        preserveAspectRatio="none",
        width="100%",
        height="100%",
        class_="inner",
    )
    picture = tag(
        "svg", *horizontal, *vertical, label, inner, overlay, class_="canvas", role="img", aria_label=description
    )
    return tag("div", picture, class_="plot")


def _grid_line(place: float, text: str) -> Html:
    y = _percent(1 - place)
    line = tag("line", x1=0, x2="100%", y1=y, y2=y, class_="grid")
    return join([line, tag("text", text, x=0, y=y, dx=-8, dy="0.32em", text_anchor="end")])


def _tick_label(place: float, text: str) -> Html:
    return tag("text", text, x=_percent(place), y="100%", dy="1.55em", text_anchor="middle")


def _draw_curve(line: Polyline, across: Scale, up: Scale) -> Html:
    # The pen is lifted at a gap: a line across it would show values that nobody measured.
    steps, pen = [], "M"
    for x, y in line.points:
        if not _drawable(y):
            pen = "M"
            continue
        steps.append(f"{pen}{_inner(across.place(x))} {_inner(1 - up.place(y))}")
        pen = "L"
    return tag("path", d="".join(steps), class_=f"line {line.style}")


def _draw_dots(line: Polyline, across: Scale, up: Scale) -> Html:
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


def _draw_bars(bars: Bars, floor: Sequence[float], up: Scale) -> Html:
    pitch = _INNER / len(floor)
    # With many bars, gaps between them would be thinner than a pixel and flicker.
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


def _round_step(rough: float) -> float:
    """Return the smallest of 1, 2, 5, 10 ... that is not below a number, up to rounding."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))


def _inner(place: float) -> str:
    return f"{place * _INNER:.4g}"


def _percent(place: float) -> str:
    return f"{100 * place:.4g}%"
