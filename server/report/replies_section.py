"""The sections on the clients' replies: their outcomes, and their cost in seconds and bytes."""

import math
from collections import Counter
from collections.abc import Sequence

from fedbasin.proto.report import ACCEPTED, ClientReport, RoundReport
from fedbasin.server.report.charts.chart import Bars
from fedbasin.server.report.charts.figures import Caption, bar_figure
from fedbasin.server.report.charts.html_table import html_table, scroll_box
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.charts.text import duration, number, size
from fedbasin.server.report.reported_run import ReportedRun
from fedbasin.server.report.summary import RoundSummary
from fedbasin.strategies.judging.outcomes import Outcome

_CLIENTS = 200  # rows of the list of clients
_STYLES = ("c1", "c2", "c3", "c4", "c5")


def draw_outcomes(run: ReportedRun, report: RoundReport) -> Html:
    """Draw replies by round, by outcome with advice, and each client of one round."""
    by_outcome = tag("div", _draw_replies(run), _advice(run), class_="grid")
    return join([by_outcome, _list_clients(report)])


def draw_costs(run: ReportedRun) -> Html:
    """Draw seconds by stage, and bytes, by round."""
    names = dict.fromkeys(stage.name for r in run.rounds for stage in r.stages)
    seconds = [
        Bars(name, [_stage_seconds(r, name) for r in run.rounds], _STYLES[index % len(_STYLES)])
        for index, name in enumerate(names)
    ]
    traffic = [
        Bars("up, from clients", [r.bytes_up for r in run.rounds], "c1"),
        Bars("down, to clients", [r.bytes_down for r in run.rounds], "c2"),
    ]
    numbers = [r.number for r in run.rounds]
    by_stage = Caption("Seconds by stage", "From the first request to the end of the stage.")
    on_wire = Caption("Bytes on the wire", "All clients together.")
    return join([bar_figure(by_stage, seconds, numbers, duration), bar_figure(on_wire, traffic, numbers, size)])


def count_outcomes(rounds: Sequence[RoundSummary]) -> list[tuple[str, int, str]]:
    """Return outcome, number of replies and advice over all rounds, the most frequent first."""
    total = sum((r.outcomes for r in rounds), Counter[str]())
    return [
        (kind, times, Outcome[kind].value if kind in Outcome.__members__ else "unknown to this version")
        for kind, times in total.most_common()
    ]


def _draw_replies(run: ReportedRun) -> Html:
    refusals = [kind for kind, _, _ in count_outcomes(run.rounds) if kind != ACCEPTED]
    stack = [Bars("accepted", [r.accepted for r in run.rounds], "good")]
    for index, kind in enumerate(refusals):
        style = f"bad shade{min(index, 3)}"
        stack.append(Bars(kind, [r.outcomes[kind] for r in run.rounds], style))
    caption = Caption("Replies by round", "All stages together.")
    return bar_figure(caption, stack, [r.number for r in run.rounds], lambda value: f"{value:g}")


def _advice(run: ReportedRun) -> Html:
    title = "Outcomes of all rounds, and advice"
    table = html_table(title, ("outcome", "replies", "meaning"), count_outcomes(run.rounds))
    return tag("div", scroll_box(table, title), class_="words")


def _list_clients(report: RoundReport) -> Html:
    replies = [(stage.stage, client) for stage in report.stages for client in stage.clients]
    replies.sort(key=lambda reply: reply[1].is_accepted)
    title = f"Clients of round {report.round}, refused first"
    more = f": {_CLIENTS} of {len(replies):,}" if len(replies) > _CLIENTS else ""
    head = ("client", "stage", "outcome", "examples", "seconds", "probing", "up", "down", "update", "cosine", "detail")
    rows = (_row(stage, client) for stage, client in replies[:_CLIENTS])
    content = scroll_box(html_table(title + more, head, rows), title)
    heading = tag("summary", f"Clients of round {report.round} ({len(replies):,} replies)")
    return tag("details", heading, content)


def _row(stage: str, client: ClientReport) -> tuple[object, ...]:
    return (
        client.node_id,
        stage,
        client.outcome,
        f"{client.examples:,.0f}",
        f"{client.seconds:.1f}",
        f"{client.probe_seconds:.1f}" if client.probe_seconds else "–",
        size(client.bytes_up),
        size(client.bytes_down),
        number(math.nan if client.update_norm is None else client.update_norm),
        number(math.nan if client.update_cosine is None else client.update_cosine),
        client.detail,
    )


def _stage_seconds(summary: RoundSummary, name: str) -> float:
    return sum(stage.seconds for stage in summary.stages if stage.name == name)
