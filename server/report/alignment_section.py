"""How far every space moved, round by round: three heat maps and their numbers."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from fedbasin.server.report.charts import figures
from fedbasin.server.report.charts.heatmap import heat_map
from fedbasin.server.report.charts.html_table import disclosed, table
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.charts.text import arrow, number
from fedbasin.server.report.reported_run import Run
from fedbasin.server.report.space_measures import MEASURES, Space, binned, spaces

_COLUMNS = 120  # more rounds are drawn several to a column


def alignment(run: Run) -> Html:
    """The spaces of a run."""
    found = [(report.round, spaces(report)) for report in run.reports]
    names = list(dict.fromkeys(name for _, one in found for name in one))
    if not names:
        return tag("p", "No client was aligned in these rounds.", class_="note")
    columns = binned(found, _COLUMNS)
    maps = (_heat(measure, names, columns) for measure in MEASURES)
    return join([tag("div", *maps, class_="grid"), _numbers(names, [one for _, one in found])])


def _heat(
    measure: str, names: Sequence[str], columns: Sequence[tuple[range, Mapping[str, Space]]]
) -> Html:
    values = [
        (span, [getattr(found[name], measure) if name in found else math.nan for name in names])
        for span, found in columns
    ]
    finite = (v for _, some in values for v in some if math.isfinite(v))
    highest = 1.0 if measure == "certified" else max(finite, default=0.0)
    spoken = (
        f"Heat map. {MEASURES[measure]}, {len(names)} spaces, rounds {columns[0][0].start} to "
        f"{columns[-1][0].stop - 1}; the table that follows has the numbers."
    )
    drawn = heat_map(names, values, highest, spoken)
    return figures.figure(measure.capitalize(), f"{MEASURES[measure]}.", drawn)


def _numbers(names: Sequence[str], rounds: Sequence[Mapping[str, Space]]) -> Html:
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
    rows = (_row(name, [found[name] for found in rounds if name in found]) for name in names)
    return disclosed(table(title, head, rows), title)


def _row(name: str, found: Sequence[Space]) -> tuple[str, ...]:
    newest = found[-1]
    return (
        name,
        number(fmean(space.moved for space in found)),
        number(newest.moved),
        number(fmean(space.gain for space in found)),
        number(newest.gain),
        number(fmean(space.certified for space in found)),
        number(newest.fixed),
        f"{math.degrees(newest.angle):.0f}°" if math.isfinite(newest.angle) else "–",
        arrow(newest.skew_before, newest.skew_after) or "–",
    )
