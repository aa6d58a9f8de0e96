"""Curves as one SVG: accuracy by round, by bytes on the wire and by the clients' processor time, these two as logarithms.

Where a task has no right and wrong, its loss takes the place of the accuracy.

A file of its own, for a Markdown page: fixed size, its own style, light and dark as the reader has it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fedbasin.server.report.charts.chart import Scale, fit_scale
from fedbasin.server.report.charts.markup import Html, join, tag, trusted
from tests.protocol.setting import Point
from tests.protocol.summary import Row
from tests.protocol.tables import megabytes

Across: TypeAlias = Callable[[Point], float | None]

_WIDE, _HIGH = 290, 210  # of a panel's drawing
_LEFT, _TOP, _GAP, _LINE = 44, 24, 56, 18
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a", "#7a5cc9")
_DASHES = ("", "7 4", "2 3")

_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #57534c; }
.rule { stroke: #d9d5cc; } path { fill: none; stroke-width: 2; stroke-linejoin: round; }
@media (prefers-color-scheme: dark) { text { fill: #b9bdc7; } .rule { stroke: #3a3f4a; } }
"""


def _logarithm(value: float) -> float | None:
    return math.log10(value) if value > 0 else None


@dataclass(frozen=True)
class Panel:
    """One of the drawings.

    Attributes:
        label: of its x axis.
        across: a point's place on it; None for nowhere.
        show: what is written at such a place.
    """

    label: str
    across: Across
    show: Callable[[float], str]

    def axis(self, rows: Sequence[Row]) -> Scale:
        """From the first place that is drawn to the last."""
        places = [x for row in rows for point in row.points if (x := self.across(point)) is not None]
        low, high = min(places, default=0.0), max(places, default=1.0)
        return Scale(low, high if high > low else low + 1, self.show)


def _height(point: Point) -> float:
    return point.loss if math.isnan(point.accuracy) else point.accuracy


def _power(exponent: float) -> str:
    return f"{10**exponent:.2g}" if exponent < 2 else f"{10**exponent:.0f}"


PANELS = (
    Panel("round", lambda point: float(point.round), "{:g}".format),
    Panel("MB up and down", lambda point: _logarithm(megabytes(point)), _power),
    Panel("client seconds", lambda point: _logarithm(point.client_seconds), _power),
)


def draw(rows: Sequence[Row], title: str) -> str:
    """The picture of a table's rows."""
    up = fit_scale([0.0, *(_height(point) for row in rows for point in row.points)])
    measure = "Accuracy" if rows[0].has_accuracy else "Loss"
    panels = [_panel(panel, rows, up) for panel in PANELS]
    placed = [
        tag("g", panel, transform=f"translate({_LEFT + index * (_WIDE + _GAP)} {_TOP})")
        for index, panel in enumerate(panels)
    ]
    legend = _legend(rows)
    width = _LEFT + len(PANELS) * (_WIDE + _GAP)
    height = _TOP + _HIGH + 50 + _LINE * ((len(rows) + 1) // 2)
    return tag(
        "svg",
        tag("style", trusted(_STYLE)),
        tag("text", measure.lower(), x=_LEFT, y=_TOP - 10),
        *placed,
        legend,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=f"{measure} by round, bytes and client seconds: {title}",
    )


def _panel(panel: Panel, rows: Sequence[Row], up: Scale) -> Html:
    across = panel.axis(rows)
    lines = [_curve(row, panel, across, up, _look(index)) for index, row in enumerate(rows)]
    label = tag("text", panel.label, x=_WIDE, y=_HIGH + 36, text_anchor="end")
    return join([*_levels(up), *_marks(across), label, *lines])


def _curve(row: Row, panel: Panel, across: Scale, up: Scale, look: dict[str, str]) -> Html:
    places = [(x, _height(point)) for point in row.points if (x := panel.across(point)) is not None]
    if len(places) == 1:  # a closed form is finished before the others have begun, and stays
        places.append((across.high, places[0][1]))
    steps = [f"{across.place(x) * _WIDE:.1f} {(1 - up.place(y)) * _HIGH:.1f}" for x, y in places]
    return tag("path", tag("title", row.rule), d="M" + "L".join(steps), **look)


def _levels(up: Scale) -> list[Html]:
    made = []
    for tick in up.ticks(5):
        y = f"{(1 - up.place(tick)) * _HIGH:.1f}"
        made.append(tag("line", x1=0, x2=_WIDE, y1=y, y2=y, class_="rule"))
        made.append(tag("text", f"{tick:.2g}", x=-8, y=y, dy="0.35em", text_anchor="end"))
    return made


def _marks(across: Scale) -> list[Html]:
    return [
        tag("text", across.show(tick), x=f"{across.place(tick) * _WIDE:.1f}", y=_HIGH + 18, text_anchor="middle")
        for tick in across.ticks()
    ]


def _legend(rows: Sequence[Row]) -> Html:
    half = (len(rows) + 1) // 2
    made = []
    for index, row in enumerate(rows):
        x = _LEFT + (index // half) * (3 * (_WIDE + _GAP) // 2)
        y = _TOP + _HIGH + 56 + _LINE * (index % half)
        made.append(tag("path", d=f"M{x} {y - 4}h26", **_look(index)))
        made.append(tag("text", row.rule, x=x + 34, y=y))
    return join(made)


def _look(index: int) -> dict[str, str]:
    dashes = _DASHES[index // len(_COLOURS) % len(_DASHES)]
    return {"stroke": _COLOURS[index % len(_COLOURS)], "stroke_dasharray": dashes}
