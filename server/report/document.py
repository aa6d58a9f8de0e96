"""A whole HTML document: the report of a run in one file, which needs no script, no server and no network."""

import json
from collections.abc import Sequence
from importlib.resources import files

from fedbasin.server.report.alignment_section import alignment
from fedbasin.server.report.barrier_section import fused, path
from fedbasin.server.report.basin_section import basin, probes
from fedbasin.server.report.charts.html_table import table
from fedbasin.server.report.charts.markup import Html, join, tag, trusted
from fedbasin.server.report.progress_section import barriers, metrics, overview, rounds
from fedbasin.server.report.replies_section import costs, outcomes
from fedbasin.server.report.reported_run import Run


def style() -> str:
    """The style sheet of report and page."""
    return (files(__package__) / "style.css").read_text(encoding="utf-8")


def report(run: Run, settings: str = "") -> str:
    """The report of a run.

    Args:
        run: its rounds.
        settings: what decides its result, as JSON; empty where it is not known.
    """
    body = (
        tag("header", title(run.name, run.newest.recipe), themes()),
        tag("main", overview(run), *parts([run], alignment(run)), _settings(settings), id="main"),
    )
    return document(f"{run.name} · fedbasin", tag("style", trusted(style())), *body)


def parts(runs: Sequence[Run], heat_maps: Html, number: int | None = None) -> list[Html]:
    """The sections that page and report share, from the barriers to the rounds.

    Args:
        runs: one, or two to compare; what cannot be laid over each other shows the first alone.
        heat_maps: the spaces of the first run.
        number: of the round whose curves and clients are shown; the newest that was probed if None.
    """
    run, whose = runs[0], f" of {runs[0].name}" if len(runs) > 1 else ""
    shown = [(one.shown(number), f"{one.name}, " if whose else "") for one in runs]
    paths = (draw(*one) for draw in (path, fused) for one in shown)
    tables = (tag("div", rounds(one), class_="card") for one in runs)
    return [
        _section("progress", "By round", tag("div", barriers(runs), metrics(runs), class_="grid")),
        _section("path", "From model to model", tag("div", *paths, class_="grid pairs")),
        _section("basin", "Where the models lie", basin(runs)),
        _section("alignment", f"Alignment by space{whose}", heat_maps),
        _section("outcomes", f"Replies{whose}", outcomes(run, run.shown(number))),
        _section(
            "costs",
            f"Seconds and bytes{whose}",
            tag("div", costs(run), probes(run), class_="grid pairs"),
        ),
        _section("rounds", "Rounds", *tables),
    ]


def document(title: str, head: Html, *body: Html) -> str:
    """A page of HTML."""
    inner = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", title),
            head,
        ]
    )
    page = tag("html", tag("head", inner), tag("body", *body), lang="en")
    return f"<!doctype html>\n{page}\n"


def title(name: str, note: str) -> Html:
    """The heading of the document."""
    return tag("h1", name, " ", tag("small", note))


def themes() -> Html:
    """The choice between light and dark: plain radio buttons, read by the style sheet."""
    choices = (
        tag(
            "label",
            tag("input", type="radio", name="theme", id=f"theme-{key}", checked=key == "auto"),
            key.capitalize(),
        )
        for key in ("auto", "light", "dark")
    )
    return tag("fieldset", tag("legend", "Colours", class_="hidden"), *choices, class_="theme")


def _section(key: str, name: str, *content: Html) -> Html:
    heading = tag("h2", name, id=f"{key}-title")
    return tag("section", heading, *content, id=key, aria_labelledby=f"{key}-title")


def _settings(text: str) -> Html:
    if not text:
        return Html()
    rows = ((key, json.dumps(value)) for key, value in json.loads(text).items())
    content = table("The settings that decide the result", ("setting", "value"), rows)
    card = tag("div", content, class_="card settings")
    return _section("settings", "What was run", card)
