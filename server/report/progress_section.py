"""The sections on the progress of a run: its tiles, its curves by round, its rounds."""

import math
from collections.abc import Sequence

from fedbasin.proto.report import ACCEPTED
from fedbasin.server.report.charts.chart import Polyline, Scale, rounds_scale
from fedbasin.server.report.charts.figures import Caption, figure, line_figure
from fedbasin.server.report.charts.html_table import html_table, scroll_box
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.charts.text import arrow, duration, number, size
from fedbasin.server.report.reported_run import ReportedRun
from fedbasin.server.report.summary import RoundSummary

LOST = (
    "The run is lost: its process is gone, and it has not said that it ended. The rounds so far are in its folder; the "
    "same app goes on after them when it is started again."
)
_RECENT = 50  # rounds whose rows are laid out at once


def draw_overview(run: ReportedRun) -> Html:
    """Draw the state of the run in six numbers."""
    newest = run.newest
    entries = (
        tag("div", tag("dt", name), tag("dd", tag("b", value), tag("span", note))) for name, value, note in _tiles(run)
    )
    problem = f"The run ended early: {newest.problem}" if newest.problem else LOST if run.lost else ""
    return join([tag("p", problem, class_="problem") if problem else Html(), tag("dl", *entries, class_="tiles")])


def draw_barriers(runs: Sequence[ReportedRun]) -> Html:
    """Draw the loss barrier by round, before and after alignment."""
    lines = [line for index, run in enumerate(runs) for line in _barrier_lines(runs, run, index)]
    if not any(math.isfinite(y) for line in lines for _, y in line.points):
        return figure(
            "Loss barrier",
            "No round evaluated the path from the anchor to its clients: set fedbasin.barrier-points to at "
            "least 2 to see it.",
        )
    note = (
        "The rise of the mean loss above the straight line between the global model and the clients’ models, "
        "nats. At 0 they lie in one basin and can be averaged."
    )
    return line_figure(Caption("Loss barrier", note), lines, _across(runs))


def draw_metrics(runs: Sequence[ReportedRun]) -> Html:
    """Draw a chart for each metric of the new global model."""
    names = dict.fromkeys(name for run in runs for r in run.rounds for name in r.metrics)
    return join(_draw_metric(runs, name) for name in names)


def draw_rounds(run: ReportedRun) -> Html:
    """Draw one row per round, the newest first; the earlier rounds of a long run are behind a disclosure."""
    newest_first = run.rounds[::-1]
    # A browser takes seconds to lay out thousands of rows; what is closed is not laid out.
    recent, earlier = newest_first[:_RECENT], newest_first[_RECENT:]
    table = _table(f"Rounds of {run.name}, newest first", recent)
    if not earlier:
        return table
    rest = _table(f"Earlier rounds of {run.name}", earlier)
    return join([table, tag("details", tag("summary", f"{len(earlier)} earlier rounds"), rest)])


def _table(title: str, rounds: Sequence[RoundSummary]) -> Html:
    names = list(dict.fromkeys(name for r in rounds for name in r.metrics))
    columns = ("round", "ended, UTC", "seconds", "accepted", "refused", "up", "down", "barrier")
    rows = (_row(r, names) for r in rounds)
    return scroll_box(html_table(title, (*columns, *names), rows), title)


def _tiles(run: ReportedRun) -> list[tuple[str, str, str]]:
    newest, rounds = run.newest, run.rounds
    barriers = [r.barrier for r in rounds if math.isfinite(r.barrier.before)]
    barrier = arrow(barriers[-1].before, barriers[-1].after) if barriers else "–"
    accepted, refused = sum(r.accepted for r in rounds), sum(r.refused for r in rounds)
    up, down = sum(r.bytes_up for r in rounds), sum(r.bytes_down for r in rounds)
    return [
        ("Round", f"{newest.number} of {newest.rounds}", run.state),
        ("Loss barrier", barrier, "before → after alignment"),
        *((name, number(value), "new global model") for name, value in _main_metric(newest)),
        ("Replies", f"{accepted:,} accepted", f"{refused:,} refused or missing"),
        ("Traffic", size(up + down), f"{size(up)} up, {size(down)} down"),
        ("Time", duration(sum(r.seconds for r in rounds)), f"recipe {newest.recipe}"),
    ]


def _main_metric(newest: RoundSummary) -> list[tuple[str, float]]:
    """Return the metric for the tiles: an accuracy if there is one."""
    return sorted(newest.metrics.items(), key=lambda item: "acc" not in item[0])[:1]


def _barrier_lines(runs: Sequence[ReportedRun], run: ReportedRun, index: int) -> list[Polyline]:
    prefix = f"{run.name}, " if len(runs) > 1 else ""
    as_trained = [(r.number, r.barrier.before) for r in run.rounds]
    aligned = [(r.number, r.barrier.after) for r in run.rounds]
    return [
        Polyline(f"{prefix}as trained", as_trained, f"before {_dash(index)}"),
        Polyline(f"{prefix}aligned", aligned, f"after {_dash(index)}"),
    ]


def _draw_metric(runs: Sequence[ReportedRun], name: str) -> Html:
    lines = [
        Polyline(
            run.name if len(runs) > 1 else name,
            [(r.number, r.metrics.get(name, math.nan)) for r in run.rounds],
            f"c{index + 1} {_dash(index)}",
        )
        for index, run in enumerate(runs)
    ]
    return line_figure(Caption(name, "Of the new global model."), lines, _across(runs))


def _row(summary: RoundSummary, names: Sequence[str]) -> tuple[object, ...]:
    kinds = ", ".join(f"{n} {kind}" for kind, n in summary.outcomes.items() if kind != ACCEPTED)
    return (
        summary.number,
        f"{summary.ended:%H:%M:%S}",
        f"{summary.seconds:.1f}",
        summary.accepted,
        kinds or "0",
        size(summary.bytes_up),
        size(summary.bytes_down),
        arrow(summary.barrier.before, summary.barrier.after),
        *(number(summary.metrics.get(name, math.nan)) for name in names),
    )


def _dash(index: int) -> str:
    # The second run of a comparison is dashed, so that colour is not all that tells the two apart.
    return "dashed" if index else ""


def _across(runs: Sequence[ReportedRun]) -> Scale:
    start = min(run.rounds[0].number for run in runs)
    return rounds_scale(start, max(run.newest.number for run in runs))
