"""The report of a run: one file, nothing hidden, nothing injected, nothing fetched."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto.report import RoundReport
from fedbasin.server.report.basin_section import CHARTS
from fedbasin.server.report.charts.chart import Bars, Polyline, Scale, bar_chart, fit_scale, line_chart
from fedbasin.server.report.charts.markup import tag
from fedbasin.server.report.charts.text import number
from fedbasin.server.report.document import render_report
from fedbasin.server.report.markdown import escape_cell, render_markdown
from fedbasin.server.report.report_file import (
    NoRunError,
    folder_to_html,
    folder_to_json_lines,
    folder_to_markdown,
    read_run,
)
from fedbasin.server.report.reported_run import ReportedRun
from fedbasin.server.report.space_measures import bin_rounds, measure_spaces
from fedbasin.server.run.resumption.checkpoint import REPORTS, append_report
from fedbasin.strategies.judging.outcomes import Outcome
from tests.server.reports import SITES, run_of
from tests.waiting import LONG

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&|`"


class Elements(HTMLParser):
    """The elements of a document, and whether each is closed in its turn."""

    def __init__(self, document):
        super().__init__()
        self.open, self.found = [], []
        self.feed(document)

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        if name not in ("meta", "link", "input"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name


@pytest.fixture
def folder(tmp_path):
    for one in run_of(rounds=4):
        append_report(tmp_path, one)
    return tmp_path


def fedbasin(*arguments):
    command = [sys.executable, "-m", "fedbasin.server.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG)


def test_the_report_is_well_formed_and_needs_neither_script_nor_network(folder):
    elements = Elements(folder_to_html(folder))
    assert elements.open == []
    names = {name for name, _ in elements.found}
    assert not names & {"script", "link", "img", "iframe", "object"}
    outside = ("href", "src", "style")
    assert not [a for _, given in elements.found for a in given if a in outside]


def test_every_chart_has_words_and_its_numbers_as_a_table(folder):
    document = folder_to_html(folder)
    figures = re.findall(r"<figure>.*?</figure>", document)
    assert len(figures) >= 9
    for figure in figures:
        label = re.search(r'role="img" aria-label="([^"]+)"', figure)[1]
        assert label.startswith(("Line chart", "Bar chart", "Heat map"))
        if not label.startswith("Heat map"):  # the three share one
            assert "<details>" in figure
            assert "<caption>" in figure


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.title)
def test_all_that_was_measured_beside_the_barrier_is_drawn_and_in_the_markdown(chart):
    run = ReportedRun.from_reports(run_of(rounds=3))
    (figure,) = re.findall(rf"<figure><figcaption><h3>{chart.title}</h3>.*?</figure>", render_report(run))
    for label, measure, _ in chart.lines:
        newest = number(run.newest.measures[measure])
        assert f'<th scope="col">{label}</th>' in figure
        assert newest in figure
        assert f"| {chart.title} | {label} | 3 | {newest} |" in render_markdown(run)


def test_a_run_that_measured_nothing_beside_the_barrier_says_so():
    reports = [
        change_clients(
            replace(report, fused_path=None, update_cosines=None, variance=(), probe=None), without_singular_vectors
        )
        for report in run_of(rounds=2)
    ]
    document = render_report(ReportedRun.from_reports(reports))
    assert "measured none of this" in document
    assert not any(chart.title in document for chart in CHARTS)
    assert "Position of the models" not in render_markdown(ReportedRun.from_reports(reports))


def test_the_way_from_the_new_model_stands_beside_the_way_from_the_anchor():
    document = render_report(ReportedRun.from_reports(run_of(rounds=2)))
    assert "Round 2: new model to clients, loss" in document
    assert "new model (0) to client (1)" in document


def test_a_space_says_how_far_it_turned_and_what_skew_is_left():
    document = render_report(ReportedRun.from_reports(run_of(rounds=1)))
    (row,) = re.findall(r'<th scope="row">blocks.0.attention.heads</th>.*?</tr>', document)
    assert re.search(r"<td>\d+°</td><td>1.2 → 0.01</td>", row)
    (row,) = re.findall(r'<th scope="row">stem.hidden</th>.*?</tr>', document)
    assert row.endswith("<td>–</td><td>–</td></tr>")


def test_each_client_says_where_its_update_went_and_what_its_probes_took():
    (one,) = run_of(rounds=1)
    document = render_report(ReportedRun.from_reports([one]))
    fused = next(c for c in one.stages[1].clients if c.outcome == "accepted")
    row = f"<td>{number(fused.update_norm)}</td><td>{number(fused.update_cosine)}</td>"
    assert row in document
    assert "Seconds of probing" in document


def test_the_report_says_what_to_do_about_refused_replies():
    (one,) = run_of(rounds=1)
    refused = change_clients(one, lambda client: replace(client, outcome="non_finite"))
    run = ReportedRun.from_reports([refused])
    assert Outcome.non_finite.value in render_report(run)
    assert escape_cell(Outcome.non_finite.value) in render_markdown(run)


def change_clients(report, change):
    """A report with a change of each of its clients."""
    stages = (replace(stage, clients=tuple(map(change, stage.clients))) for stage in report.stages)
    return replace(report, stages=tuple(stages))


def without_singular_vectors(client):
    if client.alignment is None:
        return client
    return replace(client, alignment=replace(client.alignment, singular_vectors=None))


def hostile_run():
    (one,) = run_of(rounds=1, run_id=HOSTILE, recipe=HOSTILE)
    one = replace(one, evaluate_metrics=one.evaluate_metrics | {HOSTILE: 1.0}, problem=HOSTILE)
    bootstrap, fuse, evaluate = one.stages
    liar, mover, *others = fuse.clients
    first, *rest = mover.alignment.spaces
    spaces = (replace(first, space=HOSTILE), *rest)
    mover = replace(mover, alignment=replace(mover.alignment, spaces=spaces))
    liar = replace(liar, outcome=HOSTILE, detail=HOSTILE)
    fuse = replace(fuse, clients=(liar, mover, *others))
    stages = (replace(bootstrap, stage=HOSTILE), fuse, evaluate)
    return ReportedRun.from_reports([replace(one, stages=stages)])


def test_nothing_that_a_client_or_a_run_says_becomes_an_element_or_an_attribute():
    document = render_report(hostile_run(), json.dumps({"recipe": HOSTILE}))
    elements = Elements(document)
    assert elements.open == []
    assert not {"script", "img"} & {name for name, _ in elements.found}
    assert not [key for _, given in elements.found for key in given if key.startswith("on")]


def test_markdown_keeps_hostile_words_in_their_cells():
    written = render_markdown(hostile_run())
    assert "<script>" not in written.replace("\\<script", "")
    for block in re.findall(r"(?:^\|.*\n)+", written, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1


@given(st.text())
def test_text_and_attributes_come_back_as_they_were(given_text):
    shown = given_text.replace("\r", "\n").replace("\0", "")
    document = tag("p", shown, title=shown)
    elements = Elements(document)
    assert [name for name, _ in elements.found] == ["p"]
    assert elements.found[0][1]["title"] == shown


@given(st.lists(st.floats(), min_size=1, max_size=50))
def test_any_numbers_give_a_chart_within_its_frame(values):
    drawn = line_chart(
        [Polyline("a", list(enumerate(values)), "c1")], Scale(0, max(len(values) - 1, 1)), "x", "a chart"
    )
    path = re.search(r'<path d="([^"]*)"', drawn)[1]
    coordinates = [float(number) for number in re.findall(r"-?[\d.]+(?:e[+-]?\d+)?", path)]
    assert all(-1 <= number <= 1001 for number in coordinates)
    assert path.count("M") + path.count("L") == sum(abs(value) < 1e100 for value in values)


@given(st.floats(-1e99, 1e99), st.floats(-1e99, 1e99))
def test_a_scale_holds_its_values_and_has_ticks(one, other):
    scale = fit_scale([one, other])
    assert scale.low < scale.high
    assert -1e-9 <= scale.place(min(one, other)) <= scale.place(max(one, other)) <= 1 + 1e-9
    assert 2 <= len(scale.ticks()) <= 12


def test_bars_stack_from_zero():
    drawn = bar_chart([Bars("a", [1.0], "c1"), Bars("b", [3.0], "c2")], 1, "bars")
    tops = [float(y) for y in re.findall(r'd="M[\d.]+ ([\d.]+)h', drawn)]
    assert tops == [750.0, 0.0]


def test_many_rounds_share_columns_and_their_means():
    found = [(one.round, measure_spaces(one)) for one in run_of(rounds=10)]
    columns = bin_rounds(found, 4)
    assert [(span.start, span.stop) for span, _ in columns] == [(1, 4), (4, 7), (7, 10), (10, 11)]
    name = SITES[0]
    mean = sum(given[name].moved for _, given in found[:3]) / 3
    assert columns[0][1][name].moved == pytest.approx(mean)


@pytest.mark.parametrize("less", [{"path": None}, {"stages": ()}, {"evaluate_metrics": {}}])
def test_a_run_that_measured_less_has_a_report_too(less):
    (one,) = run_of(rounds=1)
    run = ReportedRun.from_reports([replace(one, **less)])
    assert Elements(render_report(run)).open == []
    assert render_markdown(run)


def test_a_loss_that_overflowed_is_a_gap_and_null():
    one, other = run_of(rounds=2)
    loss = (*one.path.loss_before[:3], math.inf, *one.path.loss_before[4:])
    one = replace(one, path=replace(one.path, loss_before=loss))
    run = ReportedRun.from_reports([one, other])
    assert math.isnan(run.rounds[0].barrier.before)
    assert "NaN" not in render_report(run)
    assert "nan" not in render_markdown(run)


def test_json_is_one_round_a_line_and_strict(folder):
    def refuse(constant):
        raise AssertionError(constant)

    parsed = [json.loads(line, parse_constant=refuse) for line in folder_to_json_lines(folder).splitlines()]
    assert [one["round"] for one in parsed] == [1, 2, 3, 4]
    assert parsed[-1]["state"] == "finished"


def test_the_command_writes_beside_the_run_or_where_it_is_told(folder, tmp_path):
    done = fedbasin("report", folder)
    assert done.returncode == 0
    assert done.stdout.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text() == folder_to_html(folder)
    target = tmp_path / "summary.md"
    assert fedbasin("report", folder, "--markdown", "-o", target).returncode == 0
    assert target.read_text() == folder_to_markdown(folder)


def test_markdown_and_json_are_printed(folder):
    assert fedbasin("report", folder, "--markdown").stdout == folder_to_markdown(folder)
    assert fedbasin("report", folder, "--json").stdout == folder_to_json_lines(folder)
    assert fedbasin("report", folder, "--json", "--markdown").returncode == 2


def test_no_folder_is_one_line_and_1(tmp_path):
    done = fedbasin("report", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "give the folder of a run" in done.stderr


def test_a_folder_of_runs_names_them(folder):
    with pytest.raises(NoRunError, match=re.escape(str(folder))):
        read_run(folder.parent)


def test_a_folder_without_rounds_says_so(tmp_path):
    with pytest.raises(NoRunError, match="no round has ended yet"):
        read_run(tmp_path)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / REPORTS).write_bytes(b"\xff\xfe\0")
    with pytest.raises(NoRunError, match=REPORTS):
        read_run(tmp_path)


LINES = {
    "garbage": b"\x00\x01",
    "another version": RoundReport("r", 1, schema_version=99).to_json().encode(),
    "half a report": RoundReport("r", 1).to_json().encode()[:40],
    "other JSON": b"[1, 2]",
    "JSON without an end": b"[" * 100_000,
    "an escape": b'{"\x1b]0;owned\x07',
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_lines_that_are_no_reports_are_told_from_a_run_without_rounds(tmp_path, line):
    (tmp_path / REPORTS).write_bytes(line + b"\n")
    with pytest.raises(NoRunError, match="1 lines, and none is a round report: line 1: "):
        read_run(tmp_path)
    append_report(tmp_path, RoundReport("r", 2))
    done = fedbasin("report", tmp_path)
    assert done.returncode == 0
    assert "1 lines are left out, the first is line 1: " in done.stderr
    assert "\x1b" not in done.stderr
    assert read_run(tmp_path).newest.number == 2


def test_a_report_that_cannot_be_written_names_the_file(folder):
    done = fedbasin("report", folder, "-o", "/dev/full")
    assert done.returncode == 1
    assert "/dev/full cannot be written: No space left on device" in done.stderr


def test_a_store_of_several_runs_is_not_mixed(tmp_path):
    for name in ("one", "two"):
        append_report(tmp_path, RoundReport(name, 1 + (name == "two")))
    with pytest.raises(NoRunError, match="several runs"):
        read_run(tmp_path)
