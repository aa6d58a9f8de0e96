"""What the page shows, chosen by its address: `/?run=ID&with=ID&round=N`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlencode

from fedbasin.proto.fedbasin_pb2 import RunSummary
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.document import document, parts, themes, title
from fedbasin.server.report.progress_section import overview
from fedbasin.server.report.reported_run import Run


@dataclass(frozen=True)
class Choice:
    """What a reader wants to see.

    Attributes:
        run: id of a run; empty for the newest.
        other: id of a run to compare with; empty for none.
        round: whose curves and clients; None for the newest that was probed.
    """

    run: str = ""
    other: str = ""
    round: int | None = None

    @classmethod
    def read(cls, query: Mapping[str, str]) -> Self:
        """From an address; what is no number is no round."""
        number = query.get("round", "")
        return cls(
            query.get("run", ""), query.get("with", ""), int(number) if number.isdecimal() else None
        )


def page(summaries: Sequence[RunSummary], runs: list[Run], choice: Choice) -> str:
    """The whole page: works without scripts, and live with them.

    Args:
        summaries: all runs there are.
        runs: the chosen run and the one to compare with; empty where no run has reported.
        choice: what was asked for.
    """
    note = "observer" if runs else "no run has reported yet"
    head = join(
        [
            tag("link", rel="stylesheet", href="static/style.css"),
            tag("link", rel="icon", href="static/icon.svg"),
            tag("script", src="static/theme.js"),
            tag("script", src="static/page.js", type="module"),
        ]
    )
    body = [
        tag("a", "Skip to the numbers", href="#main", class_="skip"),
        tag("header", title("fedbasin", note), _state(runs), themes()),
        _chooser(summaries, runs, choice) if runs else Html(),
        tag("main", *_content(runs, choice), id="main"),
    ]
    name = f"{runs[0].name} · fedbasin" if runs else "fedbasin"
    return document(name, head, *body)


def waiting_for_spaces(run: Run) -> Html:
    """A link to the heat maps, which a script follows at once."""
    address = f"spaces?{urlencode({'run': run.name})}"
    link = tag("a", "Show the heat maps of all spaces", href=address)
    return tag("div", tag("p", link), data_src=address)


def _content(runs: list[Run], choice: Choice) -> list[Html]:
    if not runs:
        return [_welcome()]
    tiles = [overview(one) for one in runs]
    if len(runs) > 1:
        tiles = [
            join([tag("h2", run.name, class_="runname"), its])
            for run, its in zip(runs, tiles, strict=True)
        ]
    made = [join(tiles), *parts(runs, waiting_for_spaces(runs[0]), choice.round)]
    return [tag("div", part, id=f"part-{index}", data_live=True) for index, part in enumerate(made)]


def _state(runs: list[Run]) -> Html:
    state = runs[0].newest.state if runs else "waiting"
    return tag("p", state, class_="state", id="state", role="status", data_state=state)


def _chooser(summaries: Sequence[RunSummary], runs: list[Run], choice: Choice) -> Html:
    names = [one.run_id for one in reversed(summaries)]
    run = runs[0]
    other = runs[1].name if len(runs) > 1 else ""
    numbers = [("", "newest"), *((n, str(n)) for n in reversed([r.number for r in run.rounds]))]
    shown = "" if choice.round is None else choice.round
    return tag(
        "form",
        _select("run", "Run", [(name, name) for name in names], run.name),
        _select(
            "with", "Compare with", [("", "none"), *((n, n) for n in names if n != run.name)], other
        ),
        _select("round", "Curves and clients of round", numbers, shown),
        tag("button", "Show"),
        class_="choose",
        aria_label="What to show",  # a form with a name is a landmark
        id="choose",
        data_run=run.name,
        data_newest=run.newest.number,
        data_state=run.newest.state,
    )


def _select(name: str, label: str, options: Sequence[tuple[object, str]], chosen: object) -> Html:
    made = (
        tag("option", text, value=str(value), selected=value == chosen) for value, text in options
    )
    return tag("label", label, tag("select", *made, name=name, id=f"choose-{name}"))


def _welcome() -> Html:
    return tag(
        "div",
        tag("h2", "Waiting for the first round"),
        tag(
            "p",
            "Point a run here with the setting ",
            tag("code", 'fedbasin.observer = "host:port"'),
        ),
        tag("p", "and it shows up when its first round has ended.", class_="note"),
        class_="card",
    )
