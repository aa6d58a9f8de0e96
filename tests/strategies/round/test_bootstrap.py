"""The search for an anchor: the choice among clients' models, in any order of arrival."""

import itertools

import pytest
import torch

from fedbasin.proto.request import Start
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Refusal
from fedbasin.strategies.round.bootstrap import Bootstrap
from fedbasin.strategies.symmetry.transform import random
from tests.accepting import accept
from tests.strategies.round.two_layers import SYMMETRY, assert_same, perturb, state


@pytest.mark.parametrize("order", list(itertools.permutations([5, 3, 9])))
def test_first_is_the_lowest_node_in_any_order_of_arrival(order):
    stage = Bootstrap(state(0))
    for node in order:
        accept(stage, node, Update(state(node), 1.0))
    assert torch.equal(stage.finish()["first.weight"], state(3)["first.weight"])


@pytest.mark.parametrize("order", list(itertools.permutations([5, 3, 9])))
def test_largest_has_most_examples_in_any_order_of_arrival_and_ties_go_to_the_lowest_node(order):
    stage = Bootstrap(state(0), "largest")
    for node in order:
        accept(stage, node, Update(state(node), {5: 20.0, 3: 10.0, 9: 20.0}[node]))
    assert torch.equal(stage.finish()["first.weight"], state(5)["first.weight"])


def test_counters_are_the_clients_as_all_else_of_its_model_is():
    stage = Bootstrap(state(0))
    accept(stage, 3, Update({**state(3), "count": torch.tensor(7)}, 1.0))
    assert stage.finish()["count"] == 7


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3, 4])))
def test_medoid_is_closest_to_all_others_once_every_pair_is_aligned(order):
    centre = state(7)
    models = {1: state(50), 2: perturb(centre, 2, 0.2), 3: centre, 4: perturb(centre, 4, 0.2)}
    stage = Bootstrap(state(0), "medoid", SYMMETRY)
    for node in order:
        g = random(SYMMETRY, torch.Generator().manual_seed(node))
        accept(stage, node, Update(g.act(models[node]), 1.0))
    g = random(SYMMETRY, torch.Generator().manual_seed(3))
    assert torch.equal(stage.finish()["first.weight"], g.act(centre)["first.weight"])


def test_best_has_the_lowest_score_of_the_whole_model():
    seen = []

    def score(model):
        seen.append(set(model))
        return -float(model["first.weight"].sum())

    stage = Bootstrap(state(0), "best", score=score)
    for node in (1, 2, 3):
        accept(stage, node, Update(state(node), 1.0))
    best = max((1, 2, 3), key=lambda node: float(state(node)["first.weight"].sum()))
    assert torch.equal(stage.finish()["first.weight"], state(best)["first.weight"])
    assert seen == [set(state(0))] * 3


def test_a_score_that_is_no_number_never_wins():
    scores = {1: float("nan"), 2: 5.0, 3: 4.0}
    stage = Bootstrap(state(0), "best", score=lambda m: scores[int(m["first.bias"][0])])
    for node in scores:
        model = {**state(node), "first.bias": torch.full((6,), float(node))}
        accept(stage, node, Update(model, 1.0))
    assert stage.finish()["first.bias"][0] == 3


def test_bad_models_are_refused_and_nothing_gives_the_template():
    stage = Bootstrap(state(0))
    with pytest.raises(Refusal):
        accept(stage, 1, Update({"first.weight": torch.zeros(1)}, 1.0))
    assert_same(stage.finish(), state(0))


def test_it_keeps_no_view_of_a_reply():
    stage, model = Bootstrap(state(0)), state(3)
    accept(stage, 3, Update(model, 1.0))
    model["first.weight"].zero_()
    assert stage.finish()["first.weight"].any()


def test_it_asks_for_own_starts_to_be_kept():
    request = Bootstrap(state(0), "medoid", SYMMETRY).request
    assert (request.stage, request.kind) == ("bootstrap", "train")
    assert (request.start, request.keep, request.statistic) == (Start.own, True, "none")
    assert (request.aligns, request.symmetry) == (False, "")
