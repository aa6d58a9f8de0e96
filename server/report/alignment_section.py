"""The section on alignment: the movement of every space, round by round, as three heat maps and their numbers."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from fedbasin.server.report.charts.figures import figure
from fedbasin.server.report.charts.heatmap import heat_map
from fedbasin.server.report.charts.html_table import disclose, html_table
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.charts.text import arrow, number
from fedbasin.server.report.reported_run import ReportedRun
from fedbasin.server.report.space_measures import MEASURES, SpaceMeasures, bin_rounds, measure_spaces

_COLUMNS = 120  # more rounds are drawn several to a column


def draw_spaces(run: ReportedRun) -> Html:
    """Draw the alignment of a run's spaces."""
    rounds = [(report.round, measure_spaces(report)) for report in run.reports]
    names = list(dict.fromkeys(name for _, spaces in rounds for name in spaces))
    if not names:
        return tag("p", "No client was aligned in these rounds.", class_="note")
    columns = bin_rounds(rounds, _COLUMNS)
    maps = (_draw_heat_map(measure, names, columns) for measure in MEASURES)
    numbers = _numbers(names, [spaces for _, spaces in rounds])
    return join([tag("div", *maps, class_="grid"), numbers])


def _draw_heat_map(
    measure: str, names: Sequence[str], columns: Sequence[tuple[range, Mapping[str, SpaceMeasures]]]
) -> Html:
    values = [
        (span, [getattr(spaces[name], measure) if name in spaces else math.nan for name in names])
        for span, spaces in columns
    ]
    finite = (value for _, column in values for value in column if math.isfinite(value))
    highest = 1.0 if measure == "certified" else max(finite, default=0.0)
    description = (
        f"Heat map. {MEASURES[measure]}, {len(names)} spaces, rounds {columns[0][0].start} to "
        f"{columns[-1][0].stop - 1}; the table that follows has the numbers."
    )
    chart = heat_map(names, values, highest, description)
    return figure(measure.capitalize(), f"{MEASURES[measure]}.", chart)


def _numbers(names: Sequence[str], rounds: Sequence[Mapping[str, SpaceMeasures]]) -> Html:
    title = "Alignment by space: mean of all rounds, and the newest"
    head = (
        "space",
        "moved",
        "moved, newest",
        "gain",
        "gain, newest",
        "certified",
        "stayed, newest",
        "largest angle, newest",
        "skew, newest",
    )
    rows = (_row(name, [spaces[name] for spaces in rounds if name in spaces]) for name in names)
    return disclose(html_table(title, head, rows), title)


def _row(name: str, rounds: Sequence[SpaceMeasures]) -> tuple[str, ...]:
    newest = rounds[-1]
    angle = newest.largest_angle
    return (
        name,
        number(fmean(space.moved for space in rounds)),
        number(newest.moved),
        number(fmean(space.gain for space in rounds)),
        number(newest.gain),
        number(fmean(space.certified for space in rounds)),
        number(newest.fixed_points),
        f"{math.degrees(angle):.0f}°" if math.isfinite(angle) else "–",
        arrow(newest.skew_before, newest.skew_after) or "–",
    )
