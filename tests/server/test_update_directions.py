"""The movement of the global model in a round is the difference of the model it began with and the one it ended in."""

import pytest
import torch

from fedbasin.server.exchange.update_directions import UpdateDirections
from fedbasin.strategies.diagnostics.geometry import cosine
from fedbasin.strategies.tensors.state import distance


def state(seed):
    draw = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(8, 8, generator=draw), "b": torch.randn(8, generator=draw)}


def test_the_movement_is_as_long_as_the_models_are_apart():
    anchor, model = state(1), state(2)
    directions = UpdateDirections(anchor)
    directions.add(state(3))
    cosines, movement = directions.finish(model)
    assert float(movement.norm()) == pytest.approx(distance(anchor, model))
    assert cosines.fused == pytest.approx(cosine(anchor, state(3), model))
    assert (cosines.clients, cosines.entries, cosines.total_entries) == (1, 72, 72)
    assert cosines.seconds == directions.seconds > 0


def test_a_client_is_compared_with_the_movement_of_the_round_before():
    before, anchor = state(1), state(2)
    past = UpdateDirections(before)
    past.add(state(4))
    _, movement = past.finish(anchor)
    norm, cosine_before = UpdateDirections(anchor, movement).add(state(3))
    further = {name: 2 * anchor[name] - before[name] for name in anchor}
    assert norm == pytest.approx(distance(anchor, state(3)))
    assert cosine_before == pytest.approx(cosine(anchor, state(3), further))


def test_an_update_without_all_tensors_is_not_measured():
    directions = UpdateDirections(state(1))
    assert directions.add({"w": torch.zeros(8, 8)}) == (None, None)
    assert directions.finish(state(2)) is None
