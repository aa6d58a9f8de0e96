"""What a round moved the global model by is the difference of the model it began with and the one it ended in."""

import pytest
import torch

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.server.run.directions import Directions
from fedbasin.strategies.diagnostics.geometry import cosine
from fedbasin.strategies.tensors.state import distance


def state(seed):
    draw = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(8, 8, generator=draw), "b": torch.randn(8, generator=draw)}


def test_the_movement_is_as_long_as_the_models_are_apart():
    anchor, model = state(1), state(2)
    directions = Directions(anchor)
    directions.add(state(3), pb.ClientReport())
    drift, movement = directions.finish(model)
    assert float(movement.norm()) == pytest.approx(distance(anchor, model))
    assert drift.fused == pytest.approx(cosine(anchor, state(3), model))
    assert (drift.clients, drift.entries, drift.of) == (1, 72, 72)
    assert drift.seconds == directions.seconds > 0


def test_a_client_is_compared_with_the_movement_of_the_round_before():
    before, anchor, client = state(1), state(2), pb.ClientReport()
    past = Directions(before)
    past.add(state(4), pb.ClientReport())
    _, movement = past.finish(anchor)
    Directions(anchor, movement).add(state(3), client)
    further = {name: 2 * anchor[name] - before[name] for name in anchor}
    assert client.update_norm == pytest.approx(distance(anchor, state(3)))
    assert client.update_cosine == pytest.approx(cosine(anchor, state(3), further))


def test_where_no_update_was_looked_at_nothing_is_said():
    directions = Directions(state(1))
    directions.add({"w": torch.zeros(8, 8)}, pb.ClientReport())
    assert directions.finish(state(2)) is None
