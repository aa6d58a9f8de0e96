"""Text that clients, apps and other machines can set is shown as text, by every command and on every page."""

import io
import re
import typing
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from html.parser import HTMLParser

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from rich.console import Console
from typer.testing import CliRunner

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.report import ClientReport, PathSums, RoundReport, StageReport
from fedbasin.server.cli import app
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.observe.live import screen
from fedbasin.server.observe.metrics.telemetry import Telemetry
from fedbasin.server.observe.rounds_table import rounds_table
from fedbasin.server.page.view import ShownRun, render_page
from fedbasin.server.printable import printable
from fedbasin.server.report.document import render_report
from fedbasin.server.report.markdown import render_markdown
from fedbasin.server.report.reported_run import ReportedRun
from fedbasin.server.report.summary import summarise
from fedbasin.server.run.log_lines import round_lines, stage_line
from tests.observing import observer, push
from tests.server.reports import run_of
from tests.waiting import LONG

HOSTILE = ["[/x]", "[bold red]", "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "a\nb\rc", "\u202eevil", "<script>alert(1)</script>",
           "'\"><img src=x onerror=alert(2)>", "| a | b |", "`x` *y* [z](http://e)", "{{x}}", "%s %(x)s", "\x00", "é", "😀",
           "x" * 5000, "\ufeff", "\u2028", "\ud7ff", "__class__", "&lt;", "-->", "]]>"]  # fmt: skip
WORDS = st.sampled_from(HOSTILE) | st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)

# What may steer a terminal, but for the line end that tables and screens are made of.
STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def replaced(value, kind, word):
    """A value of a report with every text in it replaced: names of metrics, layers, spaces, outcomes, errors."""
    if isinstance(value, str):
        return word
    if is_dataclass(value) and not isinstance(value, Encoding):
        hints = typing.get_type_hints(type(value))
        return replace(value, **{f.name: replaced(getattr(value, f.name), hints[f.name], word) for f in fields(value)})
    if isinstance(value, Enum):
        return value
    if isinstance(value, typing.Mapping):
        return {replaced(key, None, word): replaced(entry, None, word) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(replaced(entry, None, word) for entry in value)
    return value


def hostile_run(word):
    """A run in which every text is the word, and which ends early."""
    reports = []
    for report in run_of(rounds=2, clients=3, spaces=("a.hidden", "b.heads")):
        stages = tuple(
            replace(stage, clients=(*stage.clients, ClientReport(9, "client_error", "detail", metrics={"m": 1.0})))
            for stage in report.stages
        )
        report = replace(report, stages=stages, train_metrics={"loss": 1.0}, problem="problem" if report.last else "")
        told = replaced(report, None, word)
        reports.append(told if report.problem else replace(told, problem=""))
    return reports


def accepted_again(reports):
    """The run with the outcomes that it had, so that what follows from accepted replies is shown too."""
    return [
        replace(
            r,
            stages=tuple(
                replace(s, clients=tuple(replace(c, outcome="accepted") for c in s.clients)) for s in r.stages
            ),
        )
        for r in reports
    ]


def runs(word):
    reports = hostile_run(word)
    return reports, accepted_again(reports)


def in_terminal(*renderables):
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system="standard")
    console.print(*renderables)
    # What rich itself writes to colour a line.
    return re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())


def texts(value):
    """Every text in a value of a report."""
    if isinstance(value, str):
        return {value}
    parts = vars(value).values() if is_dataclass(value) else value if isinstance(value, tuple) else ()
    if isinstance(value, typing.Mapping):
        parts = (*value, *value.values())
    return set().union(*map(texts, parts))


def test_every_text_of_a_report_is_replaced_by_the_word():
    assert texts(hostile_run("word")[-1]) == {"word"}


@pytest.mark.parametrize("word", HOSTILE)
def test_the_terminal_shows_text_as_text(word):
    for reports in runs(word):
        shown = in_terminal(rounds_table(reports), screen(reports, [summarise(r) for r in reports], 20))
        assert not STEERING.search(shown)
        if len(word) < 8:
            assert printable(word)[:7] in shown.replace("\n", "")


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(WORDS)
def test_no_text_steers_anything(word):
    for reports in runs(word):
        rounds = [summarise(report) for report in reports]
        assert not STEERING.search(in_terminal(rounds_table(reports), screen(reports, rounds, 20)))
        for line in lines_of_a_log(reports):
            assert not STEERING.search(line)
            assert "\n" not in line
        run = ReportedRun.from_reports(reports)
        markdown = render_markdown(run)
        assert not STEERING.search(markdown)
        assert rows_are_whole(markdown)
    for page in (render_report(run), render_page([], [run], ShownRun())):
        assert tags_of(page) <= HARMLESS_TAGS


def lines_of_a_log(reports):
    previous = None
    for report in reports:
        stages = tuple(replace(stage, stage="fuse") for stage in report.stages)  # a word of the server alone
        report = replace(report, stages=stages)
        yield from round_lines(report, previous)
        yield from map(stage_line, report.stages)
        yield from (str(QuorumLostError(stage, 3, 2)) for stage in report.stages)
        previous = report


def rows_are_whole(markdown):
    """Whether every table of a Markdown text has the same number of cells in each row."""
    for block in markdown.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        if len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows}) > 1:
            return False
    return True


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add((tag, *sorted(name for name, _ in attrs)))


def tags_of(page):
    parser = Tags()
    parser.feed(page)
    return parser.seen


_RUNS = [ReportedRun.from_reports(reports) for reports in (*runs("word"), run_of(rounds=2))]
HARMLESS_TAGS = tags_of(
    "".join(page for run in _RUNS for page in (render_report(run), render_page([], [run], ShownRun())))
)


@pytest.mark.parametrize("word", ["[/x]", "\x1b]0;owned\x07", "a\nbx", "\u202ex" * 100, "{x}"])
def test_no_text_breaks_the_metrics(word):
    check_metrics([report for reports in runs(word) for report in reports])


def check_metrics(reports):
    registry = CollectorRegistry()
    telemetry = Telemetry(registry)
    for report in reports:
        telemetry.observe(report)
    plain, openmetrics = generate_latest(registry).decode(), generate_openmetrics(registry).decode()
    assert not STEERING.search(plain)
    assert not STEERING.search(openmetrics)
    list(parse_openmetrics(openmetrics))


@pytest.mark.parametrize("word", ["[/x]", "\x1b]0;owned\x07", "a\nb\x9b", "<script>alert(1)</script>"])
def test_every_command_shows_text_as_text(tmp_path, word):
    reports = hostile_run(word)
    (tmp_path / "rounds.jsonl").write_text("".join(f"{report.to_json()}\n" for report in reports))
    with observer() as addresses:
        for report in reports:
            assert push(addresses.observer, report)
        commands = [
            ["rounds", addresses.observer],
            ["rounds", addresses.observer, "--run", word],
            ["rounds", addresses.observer, "--run", "nonsense"],
            ["rounds", addresses.observer, "--json"],
            ["watch", addresses.observer],
            ["watch", addresses.observer, "--json"],
            ["download", word, addresses.observer, "-o", str(tmp_path / "model")],
            ["report", str(tmp_path)],
            ["report", str(tmp_path), "--markdown"],
            ["report", str(tmp_path), "--json"],
        ]
        for command in commands:
            done = CliRunner().invoke(app, command)
            assert done.exception is None or isinstance(done.exception, SystemExit), command
            assert not STEERING.search(done.stdout + done.stderr), command
        for path in ("", "spaces", "metrics", "api/runs"):
            answer = httpx.get(f"{addresses.page}{path}", trust_env=False, timeout=LONG)
            assert answer.status_code == 200
            assert "<script>alert" not in answer.text or "html" not in answer.headers["content-type"]


def test_a_run_of_any_name_is_found_by_that_name():
    with observer() as addresses, httpx.Client(base_url=addresses.page, trust_env=False, timeout=LONG) as client:
        for word in (word for word in HOSTILE if len(word) <= 200):
            (report,) = run_of(word, rounds=1)
            assert push(addresses.observer, report)
            answer = client.get("/", params={"run": word})
            assert answer.status_code == 200
            assert client.get("/spaces", params={"run": word}).status_code == 200


FLOATS = st.floats(width=64)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(FLOATS, min_size=3, max_size=3),
    FLOATS,
    st.datetimes(timezones=st.just(__import__("datetime").UTC)),
    st.integers(0, 2**63 - 1),
)
def test_no_number_of_a_report_is_too_odd_to_be_shown(curve, value, finished, count):
    client = ClientReport(
        count, "accepted", examples=value, seconds=value, probe_seconds=value, bytes_up=count, update_norm=value
    )
    path = PathSums((0.0, 0.5, 1.0), tuple(curve), tuple(curve), tuple(curve), tuple(curve), value, 1)
    stage = StageReport("fuse", value, value, (client, client))
    report = RoundReport("run", 1, 1, "fedavg", finished, value, (stage,), path, path, server_metrics={"loss": value})
    run = ReportedRun.from_reports([report])
    in_terminal(rounds_table([report]), screen([report], run.rounds, 20))
    render_markdown(run)
    render_report(run)
    Telemetry(CollectorRegistry()).observe(report)
