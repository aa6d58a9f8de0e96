"""How a run comes along: its tiles, its curves by round, its rounds."""

import math
from collections.abc import Sequence

from fedbasin.server.report.charts import figures
from fedbasin.server.report.charts.chart import Axis, Line, rounds_axis
from fedbasin.server.report.charts.figures import Words
from fedbasin.server.report.charts.html_table import scrolled, table
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.charts.text import arrow, duration, number, size
from fedbasin.server.report.reported_run import Run
from fedbasin.server.report.summary import ACCEPTED, Round

_RECENT = 50  # rounds whose rows are laid out at once


def overview(run: Run) -> Html:
    """Where the run is, in six numbers."""
    newest = run.newest
    entries = (
        tag("div", tag("dt", name), tag("dd", tag("b", value), tag("span", note)))
        for name, value, note in _tiles(run)
    )
    problem = tag("p", f"The run ended early: {newest.problem}", class_="problem")
    return join([problem if newest.problem else Html(), tag("dl", *entries, class_="tiles")])


def barriers(runs: Sequence[Run]) -> Html:
    """Loss barrier by round, before and after alignment."""
    lines = [line for index, run in enumerate(runs) for line in _barrier_lines(runs, run, index)]
    if not any(math.isfinite(y) for line in lines for _, y in line.points):
        return figures.figure(
            "Loss barrier",
            "No round evaluated the path from the anchor to its clients: set fedbasin.barrier-points to at "
            "least 2 to see it.",
        )
    note = (
        "How far the mean loss rises above the straight line between the global model and the clients’ models, "
        "nats. At 0 they lie in one basin and can be averaged."
    )
    return figures.curves(Words("Loss barrier", note), lines, _across(runs))


def metrics(runs: Sequence[Run]) -> Html:
    """A chart for each metric of the new global model."""
    names = dict.fromkeys(name for run in runs for one in run.rounds for name in one.metrics)
    return join(_metric(runs, name) for name in names)


def rounds(run: Run) -> Html:
    """One row per round, the newest first; of a long run, the earlier ones are behind a disclosure."""
    newest_first = run.rounds[::-1]
    recent, earlier = newest_first[:_RECENT], newest_first[_RECENT:]
    table_ = _rounds(f"Rounds of {run.name}, newest first", recent)
    if not earlier:
        return table_
    rest = _rounds(f"Earlier rounds of {run.name}", earlier)
    return join([table_, tag("details", tag("summary", f"{len(earlier)} earlier rounds"), rest)])


def _rounds(title: str, rounds: Sequence[Round]) -> Html:
    names = list(dict.fromkeys(name for one in rounds for name in one.metrics))
    columns = ("round", "ended, UTC", "seconds", "accepted", "refused", "up", "down", "barrier")
    rows = (_row(one, names) for one in rounds)
    return scrolled(table(title, (*columns, *names), rows), title)


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    newest, rounds = run.newest, run.rounds
    probed = [one.barrier for one in rounds if math.isfinite(one.barrier.before)]
    barrier = arrow(probed[-1].before, probed[-1].after) if probed else "–"
    accepted, refused = sum(one.accepted for one in rounds), sum(one.refused for one in rounds)
    up, down = sum(one.bytes_up for one in rounds), sum(one.bytes_down for one in rounds)
    return [
        ("Round", f"{newest.number} of {newest.of}", newest.state),
        ("Loss barrier", barrier, "before → after alignment"),
        *((name, number(value), "new global model") for name, value in _headline(newest)),
        ("Replies", f"{accepted:,} accepted", f"{refused:,} refused or missing"),
        ("Traffic", size(up + down), f"{size(up)} up, {size(down)} down"),
        ("Time", duration(sum(one.seconds for one in rounds)), f"recipe {newest.recipe}"),
    ]


def _headline(newest: Round) -> list[tuple[str, float]]:
    """The metric for the tiles: an accuracy if there is one."""
    return sorted(newest.metrics.items(), key=lambda item: "acc" not in item[0])[:1]


def _barrier_lines(runs: Sequence[Run], run: Run, index: int) -> list[Line]:
    whose = f"{run.name}, " if len(runs) > 1 else ""
    before = [(one.number, one.barrier.before) for one in run.rounds]
    after = [(one.number, one.barrier.after) for one in run.rounds]
    return [
        Line(f"{whose}as trained", before, f"before {_dash(index)}"),
        Line(f"{whose}aligned", after, f"after {_dash(index)}"),
    ]


def _metric(runs: Sequence[Run], name: str) -> Html:
    lines = [
        Line(
            run.name if len(runs) > 1 else name,
            [(one.number, one.metrics.get(name, math.nan)) for one in run.rounds],
            f"c{index + 1} {_dash(index)}",
        )
        for index, run in enumerate(runs)
    ]
    return figures.curves(Words(name, "Of the new global model."), lines, _across(runs))


def _row(one: Round, names: Sequence[str]) -> tuple[object, ...]:
    kinds = ", ".join(f"{n} {kind}" for kind, n in one.outcomes.items() if kind != ACCEPTED)
    return (
        one.number,
        f"{one.ended:%H:%M:%S}",
        f"{one.seconds:.1f}",
        one.accepted,
        kinds or "0",
        size(one.bytes_up),
        size(one.bytes_down),
        arrow(one.barrier.before, one.barrier.after),
        *(number(one.metrics.get(name, math.nan)) for name in names),
    )


def _dash(index: int) -> str:
    """The second run of a comparison is dashed, so that colour is not all that tells them apart."""
    return "dashed" if index else ""


def _across(runs: Sequence[Run]) -> Axis:
    first = min(run.rounds[0].number for run in runs)
    return rounds_axis(first, max(run.newest.number for run in runs))
