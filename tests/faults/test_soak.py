"""Many rounds: memory, descriptors and threads stay as they are, and the folder grows by reports alone."""

import gc
import os
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict

from fedbasin.server.strategy import FedBasin
from tests.faults.seeded_grid import SeededGrid

NODES = 4
# Lists of metrics and reports grow by each round; a model or a reply that stayed in every round would be 54 MB or more.
SHAPES = {"weight": (20, 1000), "bias": (20,)}
GROWTH_BYTES = 8 * 2**20
HEADER_BYTES = 1024  # numbers of rounds have more digits later, and headers are padded


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Samples:
    """What the process and the folder hold after some rounds."""

    def __init__(self, folder: Path, rounds: set[int]) -> None:
        self.taken = []
        self._folder, self._rounds = folder, rounds

    def take(self, number: int, arrays: ArrayRecord) -> None:
        if number not in self._rounds:
            return
        gc.collect()
        files = [path for path in self._folder.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        self.taken.append(
            (
                resident_bytes(),
                sum(path.stat().st_size for path in files),
                descriptors,
                threading.active_count(),
                Counter(path.suffix for path in files),
            )
        )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("robust", ["", "median"])
@pytest.mark.parametrize("rounds", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_but_reports_grows(rounds, robust, tmp_path):
    samples = Samples(tmp_path, {rounds // 3, rounds})
    strategy = FedBasin(
        context=Context(1, 1, {}, RecordDict(), {}),
        robust=robust,
        align="off",
        fraction_evaluate=0.0,
        min_train_nodes=NODES,
        folder=tmp_path,
        poll_seconds=0.001,
    )
    arrays = ArrayRecord({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    result = strategy.start(SeededGrid(NODES), arrays, rounds, evaluate_fn=samples.take)
    (memory, size, *early), (later_memory, later_size, *late) = samples.taken
    assert len(result.reports) == rounds
    assert early == late
    assert later_size - size < HEADER_BYTES
    assert later_memory - memory < GROWTH_BYTES
