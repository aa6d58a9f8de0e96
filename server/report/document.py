"""A whole HTML document: the report of a run in one file, which needs no script, no server and no network."""

import json
from collections.abc import Sequence
from importlib.resources import files

from fedbasin.server.report.alignment_section import draw_spaces
from fedbasin.server.report.barrier_section import draw_anchor_path, draw_fused_path
from fedbasin.server.report.basin_section import draw_measures, draw_probe_cost
from fedbasin.server.report.charts.html_table import html_table
from fedbasin.server.report.charts.markup import Html, join, tag, trusted
from fedbasin.server.report.progress_section import draw_barriers, draw_metrics, draw_overview, draw_rounds
from fedbasin.server.report.replies_section import draw_costs, draw_outcomes
from fedbasin.server.report.reported_run import ReportedRun


def read_style() -> str:
    """Return the style sheet of report and page."""
    return (files(__package__) / "style.css").read_text(encoding="utf-8")


def render_report(run: ReportedRun, settings: str = "") -> str:
    """Return the report of a run.

    Args:
        run: the rounds of the run.
        settings: settings that decide its result, as JSON; empty where they are not known.
    """
    sections = draw_sections([run], draw_spaces(run))
    body = (
        tag("header", title_heading(run.name, run.newest.recipe), theme_choice()),
        tag("main", draw_overview(run), *sections, _settings(settings), id="main"),
    )
    return render_document(f"{run.name} · fedbasin", tag("style", trusted(read_style())), *body)


def draw_sections(runs: Sequence[ReportedRun], heat_maps: Html, number: int | None = None) -> list[Html]:
    """Draw the sections that page and report share, from the barriers to the rounds.

    Args:
        runs: one run, or two to compare; what cannot be laid over each other shows the first alone.
        heat_maps: the spaces of the first run.
        number: number of the round whose curves and clients are shown; None for the newest that was probed.
    """
    run, suffix = runs[0], f" of {runs[0].name}" if len(runs) > 1 else ""
    reports = [(r.select_report(number), f"{r.name}, " if suffix else "") for r in runs]
    paths = (draw(*report) for draw in (draw_anchor_path, draw_fused_path) for report in reports)
    tables = (tag("div", draw_rounds(r), class_="card") for r in runs)
    progress = tag("div", draw_barriers(runs), draw_metrics(runs), class_="grid")
    costs = tag("div", draw_costs(run), draw_probe_cost(run), class_="grid pairs")
    outcomes = draw_outcomes(run, run.select_report(number))
    return [
        _section("progress", "By round", progress),
        _section("path", "From model to model", tag("div", *paths, class_="grid pairs")),
        _section("basin", "Position of the models", draw_measures(runs)),
        _section("alignment", f"Alignment by space{suffix}", heat_maps),
        _section("outcomes", f"Replies{suffix}", outcomes),
        _section("costs", f"Seconds and bytes{suffix}", costs),
        _section("rounds", "Rounds", *tables),
    ]


def render_document(title: str, head: Html, *body: Html) -> str:
    """Return a complete HTML document."""
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


def title_heading(name: str, note: str) -> Html:
    """Return the heading of the document."""
    return tag("h1", name, " ", tag("small", note))


def theme_choice() -> Html:
    """Return the choice between light and dark: plain radio buttons, read by the style sheet."""
    # Without a script: the report is one file, and the page forbids inline scripts.
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
    content = html_table("The settings that decide the result", ("setting", "value"), rows)
    card = tag("div", content, class_="card settings")
    return _section("settings", "What was run", card)
