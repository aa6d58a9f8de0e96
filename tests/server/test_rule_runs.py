"""Runs whose models are merged by a rule: equal to the mean where the rule is one, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedbasin.server.run.settings import SettingsError, read_settings
from tests import tiny
from tests.running import run


def result_of(folder: Path, **settings: Any) -> dict[str, Tensor]:
    federation = tiny.federation(3, min_train_nodes=3, folder=str(folder))
    return run(federation, tiny.net(), 2, symmetry=tiny.symmetry(), fraction_evaluate=0.0, **settings).state_dict


def test_a_run_by_a_rule_that_is_the_mean_is_that_of_the_mean(tmp_path: Path) -> None:
    mean = result_of(tmp_path / "mean")
    for rule in ("linear", "task_arithmetic"):
        for name, tensor in result_of(tmp_path / rule, rule=rule).items():
            torch.testing.assert_close(tensor, mean[name], atol=1e-5, rtol=1e-5)
    dropped = result_of(tmp_path / "dare", rule="dare_ties density=0.5")
    again = result_of(tmp_path / "again", rule="dare_ties density=0.5")
    assert all(torch.equal(again[name], tensor) for name, tensor in dropped.items())
    assert any(not torch.allclose(mean[name], tensor) for name, tensor in dropped.items())
    assert not list(tmp_path.rglob("*.spool"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "ties", "recipe": "regmean"}, "choose the recipe fedavg"),
        ({"rule": "ties", "recipe": "head"}, "choose the recipe fedavg"),
        ({"rule": "ties", "robust": "median", "min-train-nodes": 3}, "no robust rule"),
        ({"rule": "ties", "sum": "fast"}, "sum = 'reproducible'"),
        ({"rule": "ties", "merge": "chain", "start": "own"}, "set merge = 'star'"),
        ({"rule": "model_stock", "min-train-nodes": 1}, "needs 2 clients"),
        ({"rule": "ties density=x"}, "give a number"),
    ],
)
def test_settings_that_no_rule_fits_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read_settings({f"fedbasin.{key}": value for key, value in settings.items()})
