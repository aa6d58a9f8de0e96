"""`fedbasin watch`, in a terminal and outside of one."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
from rich.console import Console

from fedbasin.proto.report import ACCEPTED, ClientReport
from fedbasin.server.observe.live import screen, sparkline
from fedbasin.server.observe.rounds_table import rounds_table
from fedbasin.server.report.summary import summarise
from fedbasin.strategies.judging.outcomes import Outcome
from tests.observing import observer, push
from tests.server.reports import run_of
from tests.waiting import LONG

WATCH = [sys.executable, "-m", "fedbasin.server.cli", "watch"]


@contextmanager
def in_a_terminal(address):
    """`fedbasin watch` on a terminal of its own; yields the process and what it has drawn so far."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen([*WATCH, address], stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def read_until(terminal, word):
    seen = ""
    while word not in seen:
        content = read(terminal)
        assert content, seen
        seen += content
    return seen


def read_all(terminal):
    """Until the other end is closed; who writes to a terminal that nobody reads stands still."""
    while read(terminal):
        pass


def read(terminal):
    """What has been drawn; empty where the other end is closed, or draws nothing more."""
    if not select.select([terminal], [], [], LONG)[0]:
        return ""
    try:
        return os.read(terminal, 65536).decode(errors="replace")  # a letter may lie across two reads
    except OSError:  # Linux's way to say that it is closed
        return ""


def test_a_terminal_shows_the_run_live_and_ends_with_its_last_round():
    first, second, last = run_of(rounds=3)
    with observer() as addresses:
        assert push(addresses.observer, first)
        with in_a_terminal(addresses.observer) as (process, terminal):
            drawn = read_until(terminal, "round 1 of 3")
            assert "barrier as trained" in drawn
            assert push(addresses.observer, second)
            read_until(terminal, "round 2 of 3")
            assert push(addresses.observer, last)
            read_until(terminal, "finished")
            read_all(terminal)
            assert process.wait(LONG) == 0


def test_ctrl_c_ends_with_130():
    with observer() as addresses:
        assert push(addresses.observer, run_of(rounds=1, of=2)[0])
        with in_a_terminal(addresses.observer) as (process, terminal):
            read_until(terminal, "round 1 of 2")
            process.send_signal(signal.SIGINT)
            read_all(terminal)
            assert process.wait(LONG) == 130


def test_outside_of_a_terminal_each_round_is_a_line():
    with observer() as addresses:
        for report in run_of(rounds=3):
            assert push(addresses.observer, report)
        done = subprocess.run([*WATCH, addresses.observer], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines() if "/3" in line] == ["1/3", "2/3", "3/3"]
    assert "\x1b" not in done.stdout


def test_a_run_that_failed_ends_the_watch_with_1():
    (report,) = run_of(rounds=1, of=5)
    report = replace(report, problem="no quorum in stage fuse")
    with observer() as addresses:
        assert push(addresses.observer, report)
        done = subprocess.run([*WATCH, addresses.observer], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 1
    assert "no quorum in stage fuse" in done.stderr


def test_the_screen_has_as_many_rounds_as_fit_and_says_what_to_do_about_refusals():
    reports = run_of(rounds=30)
    console = Console(file=io.StringIO(), width=100)
    console.print(screen(reports, [summarise(report) for report in reports], lines=10))
    drawn = console.file.getvalue()
    assert [number for number in range(1, 31) if f"\n{number}/30" in drawn] == [27, 28, 29, 30]
    assert "raise round-timeout-seconds" in drawn


def test_the_screen_says_what_stands_beside_the_barrier():
    reports = run_of(rounds=3)
    console = Console(file=io.StringIO(), width=120)
    console.print(screen(reports, [summarise(report) for report in reports], lines=10))
    drawn = console.file.getvalue()
    newest = summarise(reports[-1]).measures
    assert f"update cosine {newest['update_cosine.fused']:.3g}" in drawn
    assert f"new {newest['fused_barrier_loss']:.3g}" in drawn


def test_in_a_terminal_of_80_columns_no_word_is_broken():
    (report,) = run_of(rounds=1)
    (stage, *_) = report.stages
    clients = tuple(ClientReport(node, outcome.name) for node, outcome in enumerate(Outcome) for _ in range(12))
    metrics = {"train_accuracy": 0.123456, "evaluate_accuracy": 0.123456}
    report = replace(report, stages=(replace(stage, clients=clients),), evaluate_metrics=metrics)
    console = Console(file=io.StringIO(), width=80)
    console.print(rounds_table([report]))
    words = set(console.file.getvalue().split())
    assert {outcome.name for outcome in Outcome if outcome.name != ACCEPTED} | metrics.keys() <= words
    assert {"round", "ended", "seconds", "updates", "received", "barrier"} <= words


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([0.0, 0.0], "▁▁"), ([0.0, 1.0], "▁█"), ([1.0, float("nan")], "█·"), ([-1, 2], "▁█")],
)
def test_a_sparkline_goes_from_zero_to_the_highest(values, drawn):
    assert sparkline(values) == drawn
