"""The command line as a user has it: real processes, real ports."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata

import pytest
import typer
from typer.testing import CliRunner

from fedbasin.proto.report import ClientReport, PathSums, RoundReport, StageReport
from fedbasin.server.cli import app
from tests.observing import push
from tests.waiting import LONG

# Flower, where other tests import it, sets this variable for its own processes.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "GRPC_VERBOSITY"}
FEDBASIN = [sys.executable, "-m", "fedbasin.server.cli"]


def fedbasin(*arguments):
    return subprocess.run(
        [*FEDBASIN, *arguments],
        env=ENVIRONMENT | {"TZ": "Asia/Tokyo", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=LONG,
    )


@contextmanager
def observing(*arguments):
    """`fedbasin observe` in a process of its own; yields the process and its two addresses."""
    command = [*FEDBASIN, "observe", "--port", "0", "--metrics-port", "0", "--json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def report(round_, **fields):
    clients = (ClientReport(1, "accepted", bytes_up=1_500_000), ClientReport(2, "non_finite", bytes_up=1_500_000))
    path = PathSums(points=(0, 0.5, 1), loss_before=(1, 3, 1), loss_after=(1, 1.25, 1), examples=1)
    return RoundReport(
        run_id="run-1",
        round=round_,
        rounds=2,
        seconds=3.21,
        stages=(StageReport("train", clients=clients),),
        path=path,
        evaluate_metrics={"accuracy": 0.875},
        finished=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        **fields,
    )


@pytest.fixture(scope="module")
def address():
    """An observer that has a finished run of two rounds."""
    with observing() as (_, addresses):
        assert push(addresses["observer"], report(1))
        assert push(addresses["observer"], report(2, last=True))
        yield addresses["observer"]


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_the_version_is_the_installed_one(argument):
    done = fedbasin(argument)
    assert (done.returncode, done.stdout.strip()) == (0, metadata.version("fedbasin"))


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))
def test_help_describes_every_argument_and_option(command):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    for parameter in typer.main.get_command(app).commands[command].params:
        assert parameter.help, f"{command} {parameter.name}"
        assert parameter.help.split()[0] in shown


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["observe", "--help"]])
def test_help_needs_neither_torch_nor_flower_nor_grpc(arguments):
    code = (
        "import sys; from fedbasin.server import cli\n"
        "try: cli.main()\n"
        "finally: assert not {'torch', 'flwr', 'grpc', 'starlette'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert ("observe" in done.stdout) == ("--help" in arguments)


@pytest.mark.parametrize(
    ("command", "forbidden"), [("rounds", "torch starlette uvicorn"), ("watch", "torch starlette")]
)
def test_a_reader_of_an_observer_needs_neither_torch_nor_the_web_server(address, command, forbidden):
    code = (
        "import sys; from fedbasin.server import cli\n"
        "try: cli.main()\n"
        f"finally: assert not {set(forbidden.split())} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, command, address, "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_observer_that_is_told_to_stop_ends_well_though_it_is_watched(number):
    with observing() as (process, addresses):
        watching = subprocess.Popen(
            [*FEDBASIN, "watch", addresses["observer"], "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with watching:
            try:
                push(addresses["observer"], report(1))
                assert json.loads(watching.stdout.readline())["round"] == 1
                process.send_signal(number)
                assert process.wait(LONG) == 0
                assert process.stderr.read() == ""
                assert watching.wait(LONG) == 1
                assert watching.stderr.read().count("\n") == 1
            finally:
                watching.kill()  # or its end would be waited for, also where the test has failed


def test_the_metrics_outlive_the_run(address):
    with observing() as (_, addresses):
        push(addresses["observer"], report(1, last=True))
        with urllib.request.urlopen(addresses["metrics"], timeout=LONG) as page:
            assert b"fedbasin_runs_finished_total{" in page.read()


def test_a_killed_observer_comes_back_with_its_store(tmp_path):
    with observing("--store", str(tmp_path)) as (process, addresses):
        push(addresses["observer"], report(1))
        process.kill()
        process.wait(LONG)
    with observing("--store", str(tmp_path)) as (_, addresses):
        (line,) = fedbasin("rounds", addresses["observer"], "--json").stdout.splitlines()
        assert json.loads(line)["round"] == 1


def test_a_port_that_is_taken_gives_one_line_and_1(address):
    port = address.rpartition(":")[2]
    done = fedbasin("observe", "--port", port, "--metrics-port", "0")
    assert done.returncode == 1
    assert f"cannot listen on {address}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_metrics_port_that_is_taken_gives_one_line_and_1(address):
    done = fedbasin("observe", "--port", "0", "--metrics-port", address.rpartition(":")[2])
    assert done.returncode == 1
    assert f"cannot listen on {address} for Prometheus" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_store_that_cannot_be_made_gives_one_line_and_1(tmp_path):
    (tmp_path / "file").touch()
    done = fedbasin("observe", "--port", "0", "--metrics-port", "0", "--store", f"{tmp_path}/file/x")
    assert done.returncode == 1
    assert f"{tmp_path}/file" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["rounds"], ["watch"], ["rounds", "--run", "run-1"]])
def test_the_table_tells_a_round_in_a_row(address, command):
    done = fedbasin(*command, address)
    assert done.returncode == 0
    heading, first, *_ = done.stdout.splitlines()
    assert heading.split() == ["round", "ended", "seconds", "updates", "received", "barrier", "model,", "refusals"]
    assert " ".join(first.split()) == "1/2 12:04:05 3.2 1/2 3 MB 2 → 0.25 accuracy 0.875"
    for word in ("2/2", "1 non_finite"):
        assert word in done.stdout


@pytest.mark.parametrize("command", ["rounds", "watch"])
def test_json_gives_one_report_per_line(address, command):
    lines = fedbasin(command, address, "--json").stdout.splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]
    assert json.loads(lines[1])["last"] is True


def test_an_observer_out_of_reach_gives_one_line_with_advice_and_1():
    done = fedbasin("rounds", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "fedbasin observe" in done.stderr


def test_an_unknown_run_is_a_wrong_usage(address):
    done = fedbasin("rounds", address, "--run", "nonsense")
    assert done.returncode == 2
    assert "run-1" in done.stderr


def test_an_unknown_flag_is_a_wrong_usage():
    assert fedbasin("rounds", "--nonsense").returncode == 2
