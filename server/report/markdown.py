"""The report of a run as Markdown, for an issue, a pull request or a notebook."""

import math
from collections.abc import Iterable, Sequence

from fedbasin.proto.report import PathSums, RoundReport
from fedbasin.server.printable import printable
from fedbasin.server.report.basin_section import CHARTS
from fedbasin.server.report.charts.text import arrow, duration, number, size
from fedbasin.server.report.replies_section import count_outcomes
from fedbasin.server.report.reported_run import ReportedRun
from fedbasin.server.report.space_measures import measure_spaces
from fedbasin.server.report.summary import RoundSummary


def render_markdown(run: ReportedRun) -> str:
    """Return the run's rounds, the newest curves, outcomes with advice, and alignment by space."""
    outcomes = _table(("outcome", "replies", "meaning"), count_outcomes(run.rounds))
    parts = (
        f"# {escape_cell(run.name)}\n\n{_headline(run)}\n",
        "## Rounds\n\n" + _rounds(run.rounds),
        _curves(run.select_report()),
        _measures(run.rounds),
        "## Replies\n\n" + outcomes,
        _alignment(run.reports),
    )
    return "\n".join(part for part in parts if part)


def escape_cell(text: object) -> str:
    """Escape text so that it stays text in a cell of a table."""
    # Words of clients and apps come through here: a pipe or a newline would break the table.
    one_line = printable(" ".join(str(text).split()))
    return "".join(f"\\{letter}" if letter in r"\`*_[]<>|#" else letter for letter in one_line)


def _headline(run: ReportedRun) -> str:
    newest = run.newest
    seconds = duration(sum(r.seconds for r in run.rounds))
    traffic = size(sum(r.bytes_up + r.bytes_down for r in run.rounds))
    recipe = escape_cell(newest.recipe)
    progress = f"round {newest.number} of {newest.rounds}, {newest.state}"
    problem = f"\n\nThe run ended early: {escape_cell(newest.problem)}" if newest.problem else ""
    return f"Recipe {recipe}, {progress}; {seconds}, {traffic} on the wire.{problem}"


def _rounds(rounds: Sequence[RoundSummary]) -> str:
    names = list(dict.fromkeys(name for r in rounds for name in r.metrics))
    head = ("round", "seconds", "accepted", "refused", "up", "down", "barrier", *names)
    return _table(
        head,
        (
            (
                r.number,
                f"{r.seconds:.1f}",
                r.accepted,
                r.refused,
                size(r.bytes_up),
                size(r.bytes_down),
                arrow(r.barrier.before, r.barrier.after),
                *(number(r.metrics.get(name, math.nan)) for name in names),
            )
            for r in rounds
        ),
    )


def _curves(report: RoundReport) -> str:
    path = report.path or PathSums()
    columns = {
        "loss as trained": path.loss_before,
        "loss aligned": path.loss_after,
        "accuracy as trained": path.correct_before,
        "accuracy aligned": path.correct_after,
    }
    curves = {name: sums for name, sums in columns.items() if sums}
    if not (path.examples and curves):
        return ""
    rows = zip(path.points, *curves.values(), strict=False)
    means = ((number(t), *(number(y / path.examples) for y in ys)) for t, *ys in rows)
    return f"## From the anchor (0) to the clients (1), round {report.round}\n\n" + _table(("position", *curves), means)


def _measures(rounds: Sequence[RoundSummary]) -> str:
    """Return the newest value of everything that was measured beside the barrier."""
    rows = []
    for chart in CHARTS:
        for label, measure, _ in chart.lines:
            measured = [r for r in rounds if math.isfinite(r.measures.get(measure, math.nan))]
            if measured:
                newest = measured[-1]
                value = number(newest.measures[measure])
                rows.append((chart.title, label, newest.number, value))
    if not rows:
        return ""
    costs = [r.probe_cost for r in rounds]
    seconds = duration(sum(cost.client_seconds + cost.server_seconds for cost in costs))
    table = _table(("measure", "of", "round", "value"), rows)
    return f"## Position of the models\n\n{table}\nDiagnostics took {seconds} of clients and server together.\n"


def _alignment(reports: Sequence[RoundReport]) -> str:
    # The newest aligned round; reports are parsed one by one until it is there.
    measured = ((report.round, measure_spaces(report)) for report in reversed(reports))
    round_number, spaces = next(((n, spaces) for n, spaces in measured if spaces), (0, {}))
    if not spaces:
        return ""
    rows = (
        (
            name,
            number(space.moved),
            number(space.gain),
            number(space.certified),
            number(space.fixed_points),
            arrow(space.skew_before, space.skew_after) or "–",
        )
        for name, space in spaces.items()
    )
    head = ("space", "moved", "gain", "certified", "stayed", "skew")
    return f"## Alignment by space, round {round_number}\n\n" + _table(head, rows)


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = [f"| {' | '.join(map(escape_cell, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]]) + "\n"
