"""`fedbasin run` on a real SuperLink: what it prints and how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedbasin
from fedbasin.deploy.local import deployment
from fedbasin.server import flower_run
from tests.waiting import LONG

pytestmark = pytest.mark.deployed

PROJECT = """
[project]
name = "endings"
version = "0.1.0"
description = "An app that ends as it is told"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedbasin"
[tool.flwr.app.components]
serverapp = "endings.server:app"
clientapp = "endings.server:client"
[tool.flwr.app.config]
fails = false
"""
SERVER = """
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

app = ServerApp()
client = ClientApp()


@app.main()
def main(grid, context):
    if context.run_config["fails"]:
        raise RuntimeError("the disk of this app is full")
    print("the app has done its work")
"""


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    environment = {"PYTHONPATH": str(Path(fedbasin.__file__).parent.parent)}
    with deployment(0, str, tmp_path_factory.mktemp("deployment"), environment, LONG) as online:
        yield online


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "endings").mkdir()
    (folder / "endings/__init__.py").touch()
    (folder / "endings/server.py").write_text(SERVER)
    (folder / "pyproject.toml").write_text(PROJECT)
    return folder


def run(online, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "fedbasin.server.cli", "run", *map(str, arguments)],
        env={**os.environ, "FLWR_HOME": str(online.folder / "flwr"), "FLWR_DISABLE_UPDATE_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=LONG,
    )


def test_a_run_that_completes_ends_with_zero_and_its_log_is_printed(online, app):
    done = run(online, app, "deployment")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Successfully started run" in done.stdout


def test_a_run_that_fails_ends_with_one_and_says_why(online, app):
    done = run(online, app, "deployment", "--run-config", "fails=true")
    assert done.returncode == 1, done.stdout
    assert "failed" in done.stderr.splitlines()[-1]
    assert "the disk of this app is full" in done.stdout + done.stderr


def test_an_app_that_is_not_there_ends_with_one(online, tmp_path):
    done = run(online, tmp_path / "missing", "deployment")
    assert done.returncode == 1
    assert "the run did not start" in done.stderr


class TestLostProcess:
    """A run whose process was lost is started again; the log and the status are given."""

    def follow(self, monkeypatch, ends):
        started = []
        monkeypatch.setattr(flower_run, "_follow", lambda command, say: started.append(command) or str(len(started)))
        monkeypatch.setattr(flower_run, "_await_end", lambda run_id, where: ends[int(run_id) - 1])
        return started

    def test_it_is_started_again_until_it_completes(self, monkeypatch):
        lost = ("finished:failed", "No heartbeat received from the task")
        started = self.follow(monkeypatch, [lost, lost, ("finished:completed", "")])
        flower_run.run(Path("app"), "", [], 3, lambda line: None)
        assert len(started) == 3

    @pytest.mark.parametrize(
        ("ending", "resumes", "starts"),
        [
            (("finished:failed", "No heartbeat received from the task"), 1, 2),
            (("finished:failed", "ZeroDivisionError"), 3, 1),
            (("finished:stopped", ""), 3, 1),
        ],
    )
    def test_other_ends_and_the_last_try_are_errors(self, monkeypatch, ending, resumes, starts):
        started = self.follow(monkeypatch, [ending] * 4)
        with pytest.raises(flower_run.FlowerRunError, match=ending[0].partition(":")[2]):
            flower_run.run(Path("app"), "", [], resumes, lambda line: None)
        assert len(started) == starts
