"""A run with patience ends without a better served model, and serves the best one it had."""

import logging

import pytest
import torch
from flwr.app import MetricRecord
from safetensors.torch import load_file

from fedbasin.server.run.patience import Patience
from fedbasin.server.run.settings import SettingsError
from tests import running, tiny
from tests.server.flowers_loop import fed_basin
from tests.server.flowers_loop import start as flowers_start
from tests.server.reports import run_of

LOSSES = (9.0, 5.0, 3.0, 4.0, 3.5, 1.0, 1.0)


def run(folder, rounds, **config):
    def evaluate(number, _):
        return MetricRecord({"loss": LOSSES[number]})

    federation = tiny.federation(folder=str(folder), fraction_evaluate=0.0, align="off", **config)
    return running.run(federation, tiny.net(), rounds, evaluate_fn=evaluate)


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("cut", [None, 3])
def test_the_best_rounds_model_is_served_also_after_a_resume(tmp_path, cut, caplog):
    resume = str(run(tmp_path / "cut", cut, patience=2).folder) if cut else ""
    with caplog.at_level(logging.INFO, "flwr.fedbasin"):
        result = run(tmp_path / "whole", 6, patience=2, resume=resume)
    assert [report.last for report in result.reports] == [False, False, False, True]
    assert result.served_round == 2
    best = run(tmp_path / "best", 2).state_dict
    assert equal(result.state_dict, best)
    assert equal(load_file(result.folder / "global.safetensors"), best)
    assert "Finished 4 of 6 rounds" in caplog.text
    assert "the model of round 2" in caplog.text


def test_without_patience_every_round_runs_and_the_last_is_served(tmp_path):
    result = run(tmp_path, 5)
    assert (len(result.reports), result.served_round) == (5, 5)


def test_a_run_without_a_loss_is_refused_by_name(tmp_path):
    federation = tiny.federation(folder=str(tmp_path), align="off", patience=1)
    with pytest.raises(SettingsError, match=r"no metric with 'loss'.*set patience = 0"):
        running.run(federation, tiny.net(), 3)


def test_a_run_that_nobody_evaluates_is_refused_before_the_first_message(tmp_path):
    federation = tiny.federation(folder=str(tmp_path), align="off", patience=1, fraction_evaluate=0.0)
    with pytest.raises(SettingsError, match=r"nobody evaluates"):
        running.run(federation, tiny.net(), 3)
    assert not federation.app.trained


def test_flowers_loop_refuses_it():
    with pytest.raises(SettingsError, match=r"run it with FedBasin\.start"):
        flowers_start(fed_basin(patience=1), tiny.federation())


def test_it_is_over_after_as_many_rounds_and_never_with_zero():
    (report,) = run_of("7", rounds=1)
    assert Patience(0).after(report) == Patience(0)
    assert not Patience(0).is_over(100)
    assert [Patience(2, best_round=3).is_over(number) for number in (3, 4, 5)] == [False, False, True]
