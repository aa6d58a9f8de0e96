from itertools import permutations

import pytest
import torch

from fedbasin.strategies.alignment.many_models import match_many, match_pairs, synchronise
from fedbasin.strategies.symmetry.models.prenorm_transformer import preln_transformer
from fedbasin.strategies.symmetry.transform import random
from fedbasin.strategies.tensors.state import distance
from tests.strategies.alignment.test_matching import drawn, equal, family, near
from tests.strategies.symmetry.families import Transformer

MODELS = 4


def spread(states):
    return sum(distance(a, b) ** 2 for a, b in permutations(states, 2))


def unrelated(name):
    symmetry, _ = family(name)
    return symmetry, [family(name, seed)[1] for seed in range(MODELS)]


@pytest.mark.parametrize("name", ["mlp", "convnet", "transformer"])
def test_models_come_closer_together_and_then_stay(name):
    symmetry, models = unrelated(name)
    found = match_many(symmetry, models)
    moved = [g.act(model) for g, model in zip(found, models, strict=True)]
    assert spread(moved) < spread(models)
    again = match_many(symmetry, moved)
    assert spread(g.act(m) for g, m in zip(again, moved, strict=True)) <= spread(moved) * (1 + 1e-5)


def test_one_model_in_many_frames_comes_together():
    symmetry, anchor = family("convnet")
    models = [anchor, *(random(symmetry, drawn(seed)).act(anchor) for seed in range(3))]
    found = match_many(symmetry, models)
    moved = [g.act(model) for g, model in zip(found, models, strict=True)]
    assert all(equal(moved[0], each) for each in moved)


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_what_the_universe_says_of_pairs_closes_every_cycle(name):
    symmetry, models = unrelated(name)
    maps = synchronise(symmetry, match_pairs(symmetry, models), MODELS)
    for p, q, r in permutations(range(MODELS), 3):
        pq, qr, rp = (maps[a].inverse().after(maps[b]) for a, b in ((p, q), (q, r), (r, p)))
        assert pq.after(qr).after(rp).is_identity


def test_unrelated_models_contradict_each_other_around_a_cycle_before():
    symmetry, models = unrelated("mlp")
    pairs = match_pairs(symmetry, models)
    assert not all(
        pairs[p, q].after(pairs[q, r]).after(pairs[r, p]).is_identity
        for p, q, r in permutations(range(MODELS), 3)
    )


def test_pairs_that_agree_are_kept():
    symmetry, anchor = family("convnet")
    frames = [random(symmetry, drawn(seed)) for seed in range(MODELS)]
    pairs = {
        (p, q): frames[p].after(frames[q].inverse()) for p, q in permutations(range(MODELS), 2)
    }
    maps = synchronise(symmetry, pairs, MODELS)
    assert maps[0].is_identity
    for p, q in pairs:
        said = maps[p].inverse().after(maps[q])
        assert equal(said.act(anchor), pairs[p, q].act(anchor))


def test_one_wrong_pair_is_outvoted():
    symmetry, anchor = family("convnet")
    frames = [random(symmetry, drawn(seed)) for seed in range(MODELS)]
    pairs = {
        (p, q): frames[p].after(frames[q].inverse()) for p, q in permutations(range(MODELS), 2)
    }
    right = pairs[0, 1]
    pairs[0, 1] = random(symmetry, drawn(99))
    pairs[1, 0] = pairs[0, 1].inverse()
    maps = synchronise(symmetry, pairs, MODELS)
    assert equal(maps[0].inverse().after(maps[1]).act(anchor), right.act(anchor))


def test_turned_heads_are_synchronised_too():
    torch.manual_seed(0)
    anchor = Transformer().double().state_dict()
    symmetry = preln_transformer(anchor, heads=4, residual=False)
    models = [random(symmetry, drawn(seed)).act(near(anchor, 0.0, seed)) for seed in range(3)]
    maps = synchronise(symmetry, match_pairs(symmetry, models), 3)
    moved = [g.act(model) for g, model in zip(maps, models, strict=True)]
    assert spread(moved) < 1e-9 * spread(models)


def test_a_missing_pair_and_a_single_model_are_refused():
    symmetry, anchor = family("mlp")
    with pytest.raises(ValueError, match="pair"):
        synchronise(symmetry, {}, 2)
    with pytest.raises(ValueError, match="at least two"):
        match_many(symmetry, [anchor])
