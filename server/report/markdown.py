"""The report of a run as Markdown, for an issue, a pull request or a notebook."""

import math
from collections.abc import Iterable, Sequence

from fedbasin.proto.fedbasin_pb2 import RoundReport
from fedbasin.server.report.basin_section import CHARTS
from fedbasin.server.report.charts.text import arrow, duration, number, size
from fedbasin.server.report.replies_section import counted
from fedbasin.server.report.reported_run import Run
from fedbasin.server.report.space_measures import spaces
from fedbasin.server.report.summary import Round


def markdown(run: Run) -> str:
    """The run's rounds, the newest curves, outcomes with advice, and alignment by space."""
    parts = (
        f"# {escaped(run.name)}\n\n{_headline(run)}\n",
        "## Rounds\n\n" + _rounds(run.rounds),
        _curves(run.shown()),
        _basin(run.rounds),
        "## Replies\n\n" + _table(("outcome", "replies", "meaning"), counted(run.rounds)),
        _alignment(run.reports),
    )
    return "\n".join(part for part in parts if part)


def escaped(text: object) -> str:
    """Text that stays text in a cell of a table."""
    plain = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in r"\`*_[]<>|#" else letter for letter in plain)


def _headline(run: Run) -> str:
    newest = run.newest
    seconds = duration(sum(one.seconds for one in run.rounds))
    sent = size(sum(one.bytes_up + one.bytes_down for one in run.rounds))
    recipe = escaped(newest.recipe)
    progress = f"round {newest.number} of {newest.of}, {newest.state}"
    problem = f"\n\nThe run ended early: {escaped(newest.problem)}" if newest.problem else ""
    return f"Recipe {recipe}, {progress}; {seconds}, {sent} on the wire.{problem}"


def _rounds(rounds: Sequence[Round]) -> str:
    names = list(dict.fromkeys(name for one in rounds for name in one.metrics))
    head = ("round", "seconds", "accepted", "refused", "up", "down", "barrier", *names)
    return _table(
        head,
        (
            (
                one.number,
                f"{one.seconds:.1f}",
                one.accepted,
                one.refused,
                size(one.bytes_up),
                size(one.bytes_down),
                arrow(one.barrier.before, one.barrier.after),
                *(number(one.metrics.get(name, math.nan)) for name in names),
            )
            for one in rounds
        ),
    )


def _curves(report: RoundReport) -> str:
    path = report.path
    columns = {
        "loss as trained": path.loss_before,
        "loss aligned": path.loss_after,
        "accuracy as trained": path.correct_before,
        "accuracy aligned": path.correct_after,
    }
    there = {name: sums for name, sums in columns.items() if sums}
    if not (path.examples and there):
        return ""
    rows = zip(path.points, *there.values(), strict=False)
    means = ((number(t), *(number(y / path.examples) for y in ys)) for t, *ys in rows)
    return f"## From the anchor (0) to the clients (1), round {report.round}\n\n" + _table(
        ("position", *there), means
    )


def _basin(rounds: Sequence[Round]) -> str:
    """The newest value of everything that was measured beside the barrier."""
    rows = []
    for chart in CHARTS:
        for label, measure, _ in chart.lines:
            found = [one for one in rounds if math.isfinite(one.measures.get(measure, math.nan))]
            if found:
                value = number(found[-1].measures[measure])
                rows.append((chart.title, label, found[-1].number, value))
    if not rows:
        return ""
    spent = duration(sum(one.probing.client_seconds + one.probing.server_seconds for one in rounds))
    table = _table(("measure", "of", "round", "value"), rows)
    return f"## Where the models lie\n\n{table}\nProbing took {spent} of clients and server together.\n"


def _alignment(reports: Sequence[RoundReport]) -> str:
    aligned = ((report.round, spaces(report)) for report in reversed(reports))
    number_of, found = next(((n, some) for n, some in aligned if some), (0, {}))
    if not found:
        return ""
    rows = (
        (
            name,
            number(space.moved),
            number(space.gain),
            number(space.certified),
            number(space.fixed),
            arrow(space.skew_before, space.skew_after) or "–",
        )
        for name, space in found.items()
    )
    head = ("space", "moved", "gain", "certified", "stayed", "skew")
    return f"## Alignment by space, round {number_of}\n\n" + _table(head, rows)


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = (" | ".join(map(escaped, row)) for row in (head, *rows))
    first, *others = (f"| {line} |" for line in lines)
    return "\n".join([first, f"| {' | '.join(rule)} |", *others]) + "\n"
