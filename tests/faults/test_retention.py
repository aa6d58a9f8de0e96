import gc
import weakref

import torch
from flwr.app import Context, RecordDict

from fedbasin.server.run.serve import serve
from tests.benchmarks.grid import PulledGrid


class WatchedGrid(PulledGrid):
    """Counts the replies' contents that are alive when the next one is made."""

    def __init__(self, nodes, elements):
        super().__init__(nodes, elements)
        self.made = []
        self.alive = []

    def _answer(self, message):
        self.alive.append(sum(content() is not None for content in self.made))
        reply = super()._answer(message)
        self.made.append(weakref.ref(reply.content))
        return reply


def test_a_reply_is_let_go_before_the_next_is_pulled_without_the_garbage_collector(tmp_path):
    grid = WatchedGrid(nodes=5, elements=8)
    model = torch.nn.Module()
    model.weights = torch.nn.Parameter(torch.zeros(8))
    config = {
        "fedbasin.align": "off",
        "fedbasin.fraction-evaluate": 0.0,
        "fedbasin.folder": str(tmp_path),
    }
    gc.disable()
    try:
        serve(grid, Context(1, 1, {}, RecordDict(), config), model, rounds=2)
    finally:
        gc.enable()
    assert grid.alive == [0] * 10
