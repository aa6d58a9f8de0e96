"""A run goes on by itself where it stopped, in a folder that one process holds; another configuration is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from filelock import FileLock
from flwr.app import MetricRecord

from fedbasin.server.run.resumption import checkpoint
from fedbasin.server.run.resumption.checkpoint import CheckpointError
from fedbasin.server.run.resumption.run_folder import LOCK, RECORD
from fedbasin.server.run.settings import SettingsError
from tests import running, tiny


class CutError(BaseException):
    """The process is gone."""


def start(federation, folder, rounds=4, **arguments):
    settings = {"align": "off", "fraction_evaluate": 0.0, "folder": str(folder)} | arguments
    return running.run(federation, tiny.net(), rounds, **settings)


def cut_in(number):
    """Evaluate on the server, and end the process in a round, when its model is there and not saved."""

    def evaluate(server_round, arrays):
        if server_round == number:
            raise CutError
        return MetricRecord()

    return evaluate


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def interrupted(folder, app=None, number=3, **arguments):
    federation = tiny.federation(app=app or tiny.make_app())
    with pytest.raises(CutError):
        start(federation, folder, evaluate_fn=cut_in(number), **arguments)


@pytest.mark.parametrize("recipe", ["fedavgm", "regmean"])
def test_the_same_app_and_folder_go_on_where_they_stopped(tmp_path, recipe):
    app = tiny.make_app()
    interrupted(tmp_path / "runs", app, recipe=recipe)
    run = start(tiny.federation(app=app), tmp_path / "runs", recipe=recipe)
    undisturbed = start(tiny.federation(), tmp_path / "undisturbed", recipe=recipe)
    assert same(run.state_dict, undisturbed.state_dict)
    assert [report.round for report in run.reports] == [1, 2, 3, 4]
    assert sorted({number for _, number in app.trained}) == [1, 2, 3, 4]
    # Round 3 alone was trained twice.
    assert len(app.trained) == (4 + 1) * 3
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["1"]
    assert json.loads((tmp_path / "runs/1" / RECORD).read_text())["runs"] == ["1", "1"]


def test_a_finished_run_is_left_alone_and_its_id_makes_another_folder(tmp_path):
    first = start(tiny.federation(), tmp_path, 2)
    second = start(tiny.federation(), tmp_path, 1)
    assert (first.folder.name, second.folder.name) == ("1", "1-2")
    assert [len(checkpoint.read_reports(run.folder)) for run in (first, second)] == [2, 1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": "fisher"}, "recipe was 'fedavg' and is 'fisher'"),
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"rounds": 9}, "rounds was 4 and is 9"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(tmp_path, change, named):
    interrupted(tmp_path)
    federation = tiny.federation()
    with pytest.raises(SettingsError) as refused:
        start(federation, tmp_path, **change)
    assert named in str(refused.value)
    assert "resume = 'new'" in str(refused.value)
    assert not federation.asked


def test_the_apps_own_configuration_counts_too(tmp_path):
    interrupted(tmp_path)
    federation = tiny.federation()
    federation.run_config["lr"] = 0.1
    with pytest.raises(SettingsError, match=r"lr was 'unset' and is 0\.1"):
        start(federation, tmp_path)


def test_resume_new_leaves_the_unfinished_run(tmp_path):
    interrupted(tmp_path)
    run = start(tiny.federation(), tmp_path, 1, resume="new", seed=7)
    assert run.folder.name == "1-2"
    assert checkpoint.load(tmp_path / "1").server_round == 2


def test_a_run_that_never_finished_a_round_is_no_obstacle(tmp_path):
    interrupted(tmp_path, number=1)
    assert len(start(tiny.federation(), tmp_path, 1, seed=3).reports) == 1


def test_a_run_that_was_cut_off_before_its_first_model_begins_anew(tmp_path):
    interrupted(tmp_path, server_optimizer="momentum")
    # The optimizer's memory is written before the model, as on a disk that becomes full between the two.
    for path in (tmp_path / "1").glob("global*"):
        path.unlink()
    assert list((tmp_path / "1").rglob("*.safetensors"))
    run = start(tiny.federation(), tmp_path, server_optimizer="momentum")
    assert [report.round for report in run.reports] == [1, 2, 3, 4]


RECORDS = ["{{{", "", "[]", "null", "[" * 100_000, '{"app": 1}', None]


@pytest.mark.parametrize("record", RECORDS, ids=lambda text: "gone" if text is None else text[:12])
def test_a_run_whose_record_cannot_be_read_is_left_by_name(tmp_path, record, caplog):
    interrupted(tmp_path)
    (tmp_path / "1" / RECORD).unlink()
    if record is not None:
        (tmp_path / "1" / RECORD).write_text(record)
    run = start(tiny.federation(), tmp_path, 1)
    assert run.folder.name == "1-2"
    assert f"{tmp_path / '1' / RECORD} cannot be read" in caplog.text
    assert f"resume = '{tmp_path / '1'}' goes on with it" in caplog.text
    resumed = start(tiny.federation(), tmp_path, resume=str(tmp_path / "1"))
    assert [report.round for report in resumed.reports] == [1, 2, 3, 4]


def test_a_report_that_is_lost_is_named_when_the_run_goes_on(tmp_path):
    interrupted(tmp_path)
    file = tmp_path / "1" / checkpoint.REPORTS
    file.write_bytes(b"garbage\n" + file.read_bytes().splitlines(keepends=True)[1])
    run = start(tiny.federation(), tmp_path)
    assert [report.round for report in run.reports] == [2, 3, 4]
    (incident,) = run.reports[1].incidents
    assert incident.kind == "damaged_checkpoint"
    assert "no whole report of round 1" in incident.detail


def test_a_round_that_cannot_be_rolled_back_does_not_end_the_run(tmp_path):
    def evaluate(server_round, arrays):
        if server_round == 2:
            (tmp_path / "1" / checkpoint.MODEL).write_bytes(b"damaged")
        return MetricRecord({"loss": 100.0 if server_round == 2 else 1.0})

    run = start(tiny.federation(), tmp_path, 3, evaluate_fn=evaluate)
    assert [report.round for report in run.reports] == [1, 2, 3]
    assert [incident.kind for incident in run.reports[1].incidents] == ["loss_rose", "damaged_checkpoint"]


@pytest.mark.parametrize("name", [checkpoint.REPORTS, checkpoint.MODEL])
def test_a_round_that_cannot_be_saved_says_where_and_what_to_do(tmp_path, name):
    def evaluate(server_round, arrays):
        if server_round == 2:
            (tmp_path / "1" / name).unlink()
            (tmp_path / "1" / name).mkdir()
        return MetricRecord()

    with pytest.raises(
        CheckpointError, match=f"round 2 cannot be saved in {tmp_path / '1'}: .*{name}.*make room there"
    ):
        start(tiny.federation(), tmp_path, evaluate_fn=evaluate)


@pytest.mark.parametrize("rounds", [-1, 2.0, "3", None, True])
def test_what_is_no_number_of_rounds_is_refused(tmp_path, rounds):
    federation = tiny.federation()
    with pytest.raises(SettingsError, match=re.escape(f"num_rounds = {rounds!r}")):
        start(federation, tmp_path, rounds)
    assert not federation.asked


def test_fewer_rounds_than_are_done_are_refused(tmp_path):
    first = start(tiny.federation(), tmp_path, 3)
    with pytest.raises(SettingsError, match=r"num_rounds = 2, and .* has 3 finished rounds"):
        start(tiny.federation(), tmp_path, 2, resume=str(first.folder))


@pytest.mark.parametrize("setting", ["folder", "resume"])
def test_a_path_that_no_file_has_is_refused(tmp_path, setting):
    path = "runs\x00\x1b[2J"
    folder, settings = (path, {}) if setting == "folder" else (tmp_path, {setting: path})
    with pytest.raises(SettingsError, match=f"{setting} = .*cannot be printed"):
        start(tiny.federation(), folder, **settings)


def test_two_runs_never_write_one_folder(tmp_path):
    there, gate, results = threading.Event(), threading.Event(), {}

    def wait_in_round_3(server_round, arrays):
        if server_round == 3:
            there.set()
            assert gate.wait(120)
        return MetricRecord()

    def first():
        results["first"] = start(tiny.federation(), tmp_path, evaluate_fn=wait_in_round_3)

    thread = threading.Thread(target=first)
    thread.start()
    assert there.wait(120)
    with pytest.raises(SettingsError, match="another process runs in this folder"):
        start(tiny.federation(), tmp_path, resume=str(tmp_path / "1"))
    beside = start(tiny.federation(), tmp_path)
    gate.set()
    thread.join(120)
    assert (results["first"].folder.name, beside.folder.name) == ("1", "1-2")
    for run in (results["first"], beside):
        lines = (run.folder / checkpoint.REPORTS).read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]


def test_a_process_that_died_holds_nothing(tmp_path):
    interrupted(tmp_path)
    lock = FileLock(tmp_path / "1" / LOCK)
    lock.acquire(timeout=0)
    lock.release()
    record = json.loads((tmp_path / "1" / RECORD).read_text())
    assert (record["rounds"], record["finished"]) == (4, False)


STOPPED = """
import os, signal, sys
from pathlib import Path
from flwr.app import MetricRecord
from tests.server.test_run_folder import start
from tests import tiny

def evaluate(server_round, arrays):
    if server_round == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return MetricRecord()

start(tiny.federation(), Path(sys.argv[1]), evaluate_fn=evaluate)
print("not stopped")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process at this signal")
def test_a_stop_signal_ends_with_status_0_and_the_run_goes_on_after_the_last_finished_round(tmp_path):
    root = running.__file__.rsplit("/tests/", 1)[0]
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root})
    assert ended.returncode == 0, ended.stderr
    assert "not stopped" not in ended.stdout
    assert "stopped by SIGTERM" in ended.stderr
    assert checkpoint.load(tmp_path / "1").server_round == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [report.round for report in start(tiny.federation(), tmp_path).reports] == [1, 2, 3, 4]
