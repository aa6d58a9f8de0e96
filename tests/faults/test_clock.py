"""The wall clock is set back in the middle of a run: deadlines and the model do not notice."""

import time

import torch
from flwr.app import ArrayRecord, Context, RecordDict

from fedbasin.server.strategy import FedBasin
from tests.faults.seeded_grid import SeededGrid


def final_state(folder, on_round=lambda number, arrays: None):
    strategy = FedBasin(
        context=Context(1, 1, {}, RecordDict(), {}),
        align="off",
        fraction_evaluate=0.0,
        folder=folder,
        round_timeout_seconds=60.0,
    )
    arrays = ArrayRecord({"weight": torch.zeros(3, 2)})
    return strategy.start(SeededGrid(3), arrays, 4, evaluate_fn=on_round).state_dict


def test_a_clock_that_goes_back_an_hour_in_every_round_changes_nothing(tmp_path, monkeypatch):
    wall_clock, turned_back = time.time, []

    def turn_back(number, arrays):
        turned_back.append(number)
        monkeypatch.setattr(time, "time", lambda: wall_clock() - 3600 * len(turned_back))

    disturbed = final_state(tmp_path / "a", turn_back)
    monkeypatch.undo()
    assert turned_back == [0, 1, 2, 3, 4]
    assert torch.equal(disturbed["weight"], final_state(tmp_path / "b")["weight"])
