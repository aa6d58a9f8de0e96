"""A heat map: one row per space, one column per round, the colour in six levels."""

import math
from collections.abc import Sequence

from fedbasin.server.report.charts.chart import legend
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.charts.text import number

LEVELS = 6
_NAME = 22  # characters of a space's name that fit


def heat_map(
    names: Sequence[str], columns: Sequence[tuple[range, Sequence[float]]], highest: float, description: str
) -> Html:
    """Draw values from 0 to `highest`; NaN leaves a cell empty.

    Args:
        names: names of the rows.
        columns: rounds that a column stands for, and a value for each row.
        highest: upper end of the last level.
        description: text for screen readers.
    """
    cells = tag(
        "svg",
        *_draw_levels(columns, highest or 1.0),
        viewBox=f"0 0 {len(columns)} {len(names)}",
        preserveAspectRatio="none",
        width="100%",
        height="100%",
    )
    rows = (_row_label(name, (index + 0.5) / len(names)) for index, name in enumerate(names))
    ends = (
        tag("text", f"round {columns[0][0].start}", x=0, y="100%", dy="1.4em"),
        tag("text", columns[-1][0].stop - 1, x="100%", y="100%", dy="1.4em", text_anchor="end"),
    )
    # The height is an attribute of SVG, because the content security policy forbids inline styles.
    tall = len(names) * (14 if len(names) > 16 else 24)
    picture = tag("svg", *rows, *ends, cells, height=tall, class_="heat", role="img", aria_label=description)
    keys = [
        (f"{number(level * highest / LEVELS)}–{number((level + 1) * highest / LEVELS)}", f"h{level}")
        for level in range(LEVELS)
    ]
    return join([tag("div", picture, class_="map"), legend(keys, "swatch")])


def _draw_levels(columns: Sequence[tuple[range, Sequence[float]]], highest: float) -> list[Html]:
    # One path for each level and not one element for each cell: a browser draws thousands of cells at once.
    steps: list[list[str]] = [[] for _ in range(LEVELS)]
    # With many columns, gaps would be thinner than a pixel.
    gap = 0 if len(columns) > 60 else 0.08
    for x, (_, values) in enumerate(columns):
        for y, value in enumerate(values):
            if math.isfinite(value):
                level = min(int(max(value, 0.0) / highest * LEVELS), LEVELS - 1)
                steps[level].append(f"M{x} {y}.04h{1 - gap:g}v.92h-{1 - gap:g}z")
    return [tag("path", d="".join(cells), class_=f"fill h{n}") for n, cells in enumerate(steps)]


def _row_label(name: str, middle: float) -> Html:
    short = name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
    return tag("text", tag("title", name), short, x=0, y=f"{100 * middle:.4g}%", dx=-8, dy="0.32em", text_anchor="end")
