"""What became of the clients' replies, and what they cost."""

import math
from collections import Counter
from collections.abc import Sequence

from fedbasin.proto.fedbasin_pb2 import ClientReport, RoundReport
from fedbasin.server.report.charts import figures
from fedbasin.server.report.charts.chart import Bars
from fedbasin.server.report.charts.figures import Words
from fedbasin.server.report.charts.html_table import scrolled, table
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.charts.text import duration, number, size
from fedbasin.server.report.reported_run import Run
from fedbasin.server.report.summary import ACCEPTED, Round
from fedbasin.strategies.round.outcomes import Outcome

_CLIENTS = 200  # rows of the list of clients
_STYLES = ("c1", "c2", "c3", "c4", "c5")


def outcomes(run: Run, report: RoundReport) -> Html:
    """Replies by round, by outcome with advice, and each client of one round."""
    return join([tag("div", _by_round(run), _advice(run), class_="grid"), _clients(report)])


def costs(run: Run) -> Html:
    """Seconds by stage, and bytes, by round."""
    names = dict.fromkeys(stage.name for one in run.rounds for stage in one.stages)
    seconds = [
        Bars(name, [_seconds(one, name) for one in run.rounds], _STYLES[index % len(_STYLES)])
        for index, name in enumerate(names)
    ]
    sent = [
        Bars("up, from clients", [one.bytes_up for one in run.rounds], "c1"),
        Bars("down, to clients", [one.bytes_down for one in run.rounds], "c2"),
    ]
    numbers = _numbers(run)
    return join(
        [
            figures.bars(
                Words("Seconds by stage", "From first request to value."),
                seconds,
                numbers,
                duration,
            ),
            figures.bars(Words("Bytes on the wire", "All clients together."), sent, numbers, size),
        ]
    )


def counted(rounds: Sequence[Round]) -> list[tuple[str, int, str]]:
    """Outcomes of all rounds with their number and what to do about them, the most frequent first."""
    total = sum((one.outcomes for one in rounds), Counter[str]())
    return [(kind, times, _meaning(kind)) for kind, times in total.most_common()]


def _by_round(run: Run) -> Html:
    refused = [kind for kind, _, _ in counted(run.rounds) if kind != ACCEPTED]
    stack = [Bars("accepted", [one.accepted for one in run.rounds], "good")]
    for index, kind in enumerate(refused):
        style = f"bad shade{min(index, 3)}"
        stack.append(Bars(kind, [one.outcomes[kind] for one in run.rounds], style))
    words = Words("Replies by round", "All stages together.")
    return figures.bars(words, stack, _numbers(run), lambda value: f"{value:g}")


def _advice(run: Run) -> Html:
    title = "Outcomes of all rounds, and what to do"
    content = table(title, ("outcome", "replies", "meaning"), counted(run.rounds))
    return tag("div", scrolled(content, title), class_="words")


def _clients(report: RoundReport) -> Html:
    found = [(stage.stage, client) for stage in report.stages for client in stage.clients]
    found.sort(key=lambda pair: pair[1].outcome == ACCEPTED)
    title = f"Clients of round {report.round}, refused first"
    more = f": {_CLIENTS} of {len(found):,}" if len(found) > _CLIENTS else ""
    head = (
        "client",
        "stage",
        "outcome",
        "examples",
        "seconds",
        "probing",
        "up",
        "down",
        "update",
        "cosine",
        "detail",
    )
    rows = (_row(stage, client) for stage, client in found[:_CLIENTS])
    content = scrolled(table(title + more, head, rows), title)
    heading = tag("summary", f"Clients of round {report.round} ({len(found):,} replies)")
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
        number(client.update_norm if client.HasField("update_norm") else math.nan),
        number(client.update_cosine if client.HasField("update_cosine") else math.nan),
        client.detail,
    )


def _meaning(kind: str) -> str:
    return Outcome[kind].value if kind in Outcome.__members__ else "unknown to this version"


def _numbers(run: Run) -> list[int]:
    return [one.number for one in run.rounds]


def _seconds(one: Round, name: str) -> float:
    return sum(stage.seconds for stage in one.stages if stage.name == name)
