"""The page in HTML, chosen by its address: `/?run=ID&with=ID&round=N`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlencode

from fedbasin.proto.observer_service import RunSummary
from fedbasin.server.report.charts.markup import Html, join, tag
from fedbasin.server.report.document import draw_sections, render_document, theme_choice, title_heading
from fedbasin.server.report.progress_section import draw_overview
from fedbasin.server.report.reported_run import ReportedRun

_ROUND_DIGITS = 10
_SHOWN = 20  # characters of a bad value


class RoundError(ValueError):
    """Text that is not the number of a round; the message says where it was given."""


@dataclass(frozen=True)
class ShownRun:
    """The choice of a reader.

    Attributes:
        run: id of a run; empty for the newest.
        compared: id of a run to compare with; empty for none.
        round: number of the round whose curves and clients are shown; None for the newest that was probed.
    """

    run: str = ""
    compared: str = ""
    round: int | None = None

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Self:
        """Read the choice from an address.

        Raises:
            RoundError: the round is not a number.
        """
        number = query.get("round", "")
        return cls(query.get("run", ""), query.get("with", ""), read_round(number, "round") if number else None)


def read_round(text: str, name: str) -> int:
    """Return the number of a round in an address or a header.

    Raises:
        RoundError: the text is not a number, or one that no round has.
    """
    if not (text.isascii() and text.isdecimal() and len(text) <= _ROUND_DIGITS):
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
        raise RoundError(
            f"{name} is '{shown}', which is not the number of a round; give one of 1 to {_ROUND_DIGITS} digits"
        )
    return int(text)


def render_page(summaries: Sequence[RunSummary], runs: list[ReportedRun], choice: ShownRun) -> str:
    """Return the whole page, which works without scripts, and is live with them.

    Args:
        summaries: all runs there are.
        runs: the chosen run and the one to compare with; empty where no run has reported.
        choice: the reader's choice.
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
        tag("header", title_heading("fedbasin", note), _state(summaries, runs), theme_choice()),
        _chooser(summaries, runs, choice) if runs else Html(),
        tag("main", *_content(summaries, runs, choice), id="main"),
    ]
    name = f"{runs[0].name} · fedbasin" if runs else "fedbasin"
    return render_document(name, head, *body)


def link_to_spaces(run: ReportedRun) -> Html:
    """Return a link to the heat maps, which a script follows at once.

    The heat maps read every report of the run; the page is not to wait for them.
    """
    address = f"spaces?{urlencode({'run': run.name})}"
    link = tag("a", "Show the heat maps of all spaces", href=address)
    return tag("div", tag("p", link), data_src=address)


def _content(summaries: Sequence[RunSummary], runs: list[ReportedRun], choice: ShownRun) -> list[Html]:
    without_round = tag("div", *map(_first_round, reversed(summaries)), id="first-rounds", data_live=True)
    if not runs:
        return [without_round, _welcome()]
    overviews = [draw_overview(run) for run in runs]
    if len(runs) > 1:
        overviews = [
            join([tag("h2", run.name, class_="runname"), overview])
            for run, overview in zip(runs, overviews, strict=True)
        ]
    parts = [join(overviews), *draw_sections(runs, link_to_spaces(runs[0]), choice.round)]
    return [without_round, *(tag("div", part, id=f"part-{index}", data_live=True) for index, part in enumerate(parts))]


def _first_round(run: RunSummary) -> Html:
    """Return a note on a run that has not reported a round; nothing for any other."""
    if run.has_reported:
        return Html()
    text = f"Run {run.run_id} ({run.recipe}) is in its first round."
    lost = f"Run {run.run_id} ({run.recipe}) was lost in its first round: its process is gone."
    return tag("p", lost, class_="problem") if run.lost else tag("p", text, class_="note")


def _state(summaries: Sequence[RunSummary], runs: list[ReportedRun]) -> Html:
    state = runs[0].state if runs else summaries[-1].state if summaries else "waiting"
    return tag("p", state, class_="state", id="state", role="status", data_state=state)


def _chooser(summaries: Sequence[RunSummary], runs: list[ReportedRun], choice: ShownRun) -> Html:
    run = runs[0]
    names = [summary.run_id for summary in reversed(summaries) if summary.has_reported]
    compared = [("", "none"), *((name, name) for name in names if name != run.name)]
    numbers = [("", "newest"), *((r.number, str(r.number)) for r in reversed(run.rounds))]
    return tag(
        "form",
        _select("run", "Run", [(name, name) for name in names], run.name),
        _select("with", "Compare with", compared, runs[1].name if len(runs) > 1 else ""),
        _select("round", "Curves and clients of round", numbers, "" if choice.round is None else choice.round),
        tag("button", "Show"),
        class_="choose",
        aria_label="What to show",  # a form with a name is a landmark
        id="choose",
        data_run=run.name,
        data_newest=run.newest.number,
        data_state=run.state,
    )


def _select(name: str, label: str, options: Sequence[tuple[object, str]], chosen: object) -> Html:
    items = (tag("option", text, value=str(value), selected=value == chosen) for value, text in options)
    return tag("label", label, tag("select", *items, name=name, id=f"choose-{name}"))


def _welcome() -> Html:
    return tag(
        "div",
        tag("h2", "Waiting for the first round"),
        tag("p", "Point a run here with the setting ", tag("code", 'fedbasin.observer = "host:port"')),
        tag("p", "The run shows up when its first round has ended.", class_="note"),
        class_="card",
    )
