import time
from pathlib import Path

import pytest
import torch

from fedbasin.deploy.demo import APP
from fedbasin.deploy.local import deployment
from fedbasin.server.run.resumption import checkpoint
from tests.waiting import LONG

pytestmark = [pytest.mark.deployed, pytest.mark.slow]

NODES = 3
CONFIG = {
    "num-server-rounds": 3,
    "width": 64,
    "epochs": 3,
    "fedbasin.recipe": "fedavg",
    "fedbasin.min-available-nodes": NODES,
    "fedbasin.barrier-points": 0,
}


class KilledError(Exception):
    """The ServerApp is dead; nobody waits for Flower to notice."""


def node_config(index):
    return f"partition-id={index} num-partitions={NODES}"


def folder_of(runs: Path) -> Path:
    (folder,) = (path.parent for path in runs.glob("*/rounds.jsonl"))
    return folder


def test_a_run_killed_in_a_round_ends_bit_for_bit_as_if_nothing_had_happened(tmp_path):
    with deployment(NODES, node_config, tmp_path / "deployment", timeout_seconds=LONG) as flower:
        flower.run(APP, CONFIG | {"fedbasin.folder": str(tmp_path / "undisturbed")})

        def kill_in_round_two(line):
            if "[ROUND 2/3]" in line:
                time.sleep(3)  # it has been asked: a node takes as long to look for it
                assert flower.kill_serverapps() == 1
                raise KilledError

        with pytest.raises(KilledError):
            flower.run(APP, CONFIG | {"fedbasin.folder": str(tmp_path / "killed")}, kill_in_round_two)
        killed = folder_of(tmp_path / "killed")
        assert checkpoint.load(killed).server_round == 1
        flower.run(APP, CONFIG | {"fedbasin.resume": str(killed)})
    undisturbed = folder_of(tmp_path / "undisturbed")
    assert [report.round for report in checkpoint.read_reports(killed)] == [1, 2, 3]
    resumed, expected = checkpoint.load(killed), checkpoint.load(undisturbed)
    assert resumed.server_round == expected.server_round == 3
    assert resumed.model.keys() == expected.model.keys()
    assert all(torch.equal(resumed.model[name], expected.model[name]) for name in expected.model)
