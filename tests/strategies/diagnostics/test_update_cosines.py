import math
from itertools import combinations
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.strategies.diagnostics.geometry import cosine
from fedbasin.strategies.diagnostics.update_cosines import Sample, UpdateCosineAccumulator
from fedbasin.strategies.tensors.state import distance

quickly = settings(max_examples=20, deadline=None)


def states(count, seed, width=30):
    """An anchor and clients that moved from it in related directions."""
    draw = torch.Generator().manual_seed(seed)

    def state(pull=0.0):
        return {
            "w": torch.randn(width, width, generator=draw) + pull,
            "b": torch.randn(width, generator=draw).half().float(),
            "none": torch.zeros(0),
            "steps": torch.tensor(3),
        }

    return state(), [state(0.5) for _ in range(count)]


@quickly
@given(st.integers(1, 5), st.integers(0, 99))
def test_a_small_model_is_looked_at_whole(count, seed):
    anchor, clients = states(count, seed)
    before, after = (states(1, seed + other)[0] for other in (100, 200))
    past = UpdateCosineAccumulator(anchor).movement(before)
    drift = UpdateCosineAccumulator(anchor, past)
    said = [drift.add(client) for client in clients]
    found = drift.finish(drift.movement(after))
    assert drift.sample.entries == drift.sample.of == 930
    for direction, client in zip(said, clients, strict=True):
        assert direction.norm == pytest.approx(distance(anchor, client), rel=1e-6)
        assert direction.cosine == pytest.approx(cosine(anchor, client, before), abs=1e-6)
    assert found.clients == count
    assert found.norm == pytest.approx(fmean(distance(anchor, c) for c in clients), rel=1e-6)
    assert found.fused == pytest.approx(fmean(cosine(anchor, c, after) for c in clients), abs=1e-6)
    assert found.previous == pytest.approx(fmean(one.cosine for one in said), abs=1e-6)
    if count > 1:
        mean = fmean(cosine(anchor, a, b) for a, b in combinations(clients, 2))
        assert found.pairs == pytest.approx(mean, abs=1e-6)
    else:
        assert found.pairs is None


def test_a_sample_of_a_large_model_comes_close():
    anchor, clients = states(2, 1, width=400)
    part = UpdateCosineAccumulator(anchor)
    assert part.sample.entries < 0.03 * part.sample.of
    for client in clients:
        part.add(client)
    found = part.finish(part.movement(clients[0]))
    assert found.norm == pytest.approx(fmean(distance(anchor, c) for c in clients), rel=0.02)
    assert found.pairs == pytest.approx(cosine(anchor, *clients), abs=0.03)


def test_the_same_shapes_give_the_same_entries():
    (one, _), (other, _) = states(0, 1, width=300), states(0, 2, width=300)
    first, second = Sample.draw(one), Sample.draw(other)
    assert all(torch.equal(first.places[name], second.places[name]) for name in first.places)


def test_a_client_that_did_not_move_has_no_direction():
    anchor, clients = states(1, 1)
    drift = UpdateCosineAccumulator(anchor)
    still = drift.add(anchor)
    assert (still.norm, still.cosine) == (0.0, None)
    found = drift.finish(drift.movement(anchor))
    assert (found.clients, found.norm, found.fused, found.pairs) == (1, 0.0, None, None)
    drift.add(clients[0])
    drift.add(clients[0])
    assert drift.finish(drift.movement(clients[0])).fused == pytest.approx(1)
    assert drift.finish(drift.movement(clients[0])).pairs == pytest.approx(1)


def test_what_sends_no_weights_has_no_update():
    anchor, _ = states(0, 1)
    drift = UpdateCosineAccumulator(anchor)
    assert drift.add({"b": anchor["b"]}) is None
    assert drift.finish(drift.movement(anchor)).clients == 0
    assert math.isfinite(drift.finish(drift.movement(anchor)).norm)


def test_a_model_without_weights_has_no_movement():
    drift = UpdateCosineAccumulator({"steps": torch.tensor(1)})
    assert drift.sample.entries == 0
    assert drift.add({"steps": torch.tensor(2)}).norm == 0
