"""The last lines of a run in the log: what became of it, and how to see it."""

import logging
from dataclasses import replace
from pathlib import Path

from fedbasin.server.run.log_lines import end_lines
from tests import running, tiny
from tests.server.reports import run_of


def told(reports, observer=""):
    return "\n".join(end_lines(reports, 12.3, Path("runs/7"), observer))


def test_they_name_result_barrier_refusals_model_and_how_to_see_it():
    reports = run_of("7", rounds=6)
    lines = told(reports, "observer:9470")
    newest = reports[-1]
    assert "6 rounds in 12.3 s" in lines
    assert f"test-accuracy {newest.evaluate_metrics['test-accuracy']:.4g}" in lines
    assert f"in round {newest.round}" in lines
    clients = [client for report in reports for stage in report.stages for client in stage.clients]
    refused = [client for client in clients if not client.is_accepted]
    assert f"Refused replies: {len(refused)} of {len(clients)}" in lines
    assert all(client.outcome in lines for client in refused)
    for word in ("runs/7/global.safetensors", "fedbasin report runs/7", "fedbasin watch observer:9470 --run 7", "page"):
        assert word in lines


def test_what_was_not_measured_is_said_and_not_left_out():
    (report,) = run_of("7", rounds=1)
    lines = told([replace(report, path=None, evaluate_metrics={})])
    assert "no metric was measured" in lines
    assert "set barrier-points" in lines
    assert "watch" not in lines
    assert "without a round" in told([])


def test_a_run_ends_with_them(tmp_path, caplog):
    caplog.set_level(logging.INFO, "flwr.fedbasin")
    config = {"barrier_points": 2, "fraction_evaluate": 1.0, "folder": str(tmp_path)}
    result = running.run(tiny.federation(), tiny.net(), 1, symmetry=tiny.symmetry(), **config)
    last = [record.getMessage() for record in caplog.records if record.name == "flwr.fedbasin"][-5:]
    assert last == [*end_lines(result.reports, float(last[0].split(" in ")[1].split()[0]), result.folder, "")]
    assert "accuracy" in last[0]
    assert "->" in last[1].partition("aligned:")[2]
