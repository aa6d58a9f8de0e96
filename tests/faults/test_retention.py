import gc
import weakref

import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict

from fedbasin.server.strategy import FedBasin
from tests.benchmarks.grid import PulledGrid


class WatchedGrid(PulledGrid):
    """Counts the replies' contents that are alive when the next one is made."""

    def __init__(self, nodes):
        super().__init__(nodes)
        self.made = []
        self.alive = []

    def _answer(self, message):
        self.alive.append(sum(content() is not None for content in self.made))
        reply = super()._answer(message)
        self.made.append(weakref.ref(reply.content))
        return reply


@pytest.mark.parametrize(("packed", "robust"), [(True, ""), (False, ""), (True, "median"), (False, "median")])
def test_a_reply_is_let_go_before_the_next_is_pulled_without_the_garbage_collector(tmp_path, packed, robust):
    grid = WatchedGrid(nodes=5)
    config = {
        "fedbasin.align": "off",
        "fedbasin.fraction-evaluate": 0.0,
        "fedbasin.folder": str(tmp_path),
        "fedbasin.packed": packed,
        "fedbasin.robust": robust,
        "fedbasin.min-train-nodes": 5,
    }
    strategy = FedBasin(context=Context(1, 1, {}, RecordDict(), config))
    gc.disable()
    try:
        strategy.start(grid, ArrayRecord({"weights": torch.zeros(8)}), 2)
    finally:
        gc.enable()
    assert grid.alive == [0] * 10
