"""The stage in which clients train: its request, what it sums, and what it refuses without a trace."""

import pytest
import torch

from fedbasin.proto.layer_graph import BatchNorm, LayerGraph
from fedbasin.proto.request import Request, Start
from fedbasin.strategies.alignment.identity_bound import identity_bounds
from fedbasin.strategies.fusion.accumulator import fuse
from fedbasin.strategies.fusion.precisions import Diagonal, Gram
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.fuse import Fuse, fusing_stage
from fedbasin.strategies.symmetry.transform import random
from fedbasin.strategies.tensors.state import floating
from tests.accepting import accept
from tests.strategies.round.two_layers import BLOCKS, SYMMETRY, assert_same, gram_update, perturb, plain_update, state


def fusing(recipe, align, symmetry=None, blocks=None, **fields):
    return fusing_stage(state(0), RECIPES[recipe], Request("", **fields), symmetry, align, blocks)


class TestRequest:
    def test_asks_for_the_recipes_statistic(self):
        for recipe in (r for r in RECIPES.values() if r.lora is None):
            stage = fusing(recipe.name, "off", start=Start.own, path_points=5)
            request = stage.request
            assert (request.stage, request.kind) == ("fuse", "train")
            assert (request.statistic, request.start) == (recipe.statistic.name, Start.own)
            assert (request.path_points, request.shrink) == (5, recipe.shrink)

    def test_sends_symmetry_and_radii_only_where_clients_align(self):
        for align in ("client", "server", "off"):
            request = fusing("fedavg", align, SYMMETRY).request
            assert request.symmetry == (str(SYMMETRY) if align == "client" else "")
            assert request.aligns == (align == "client")
            expected = identity_bounds(SYMMETRY, state(0)) if align == "client" else {}
            assert set(request.identity_bounds) == ({"hidden"} if align == "client" else set())
            assert all(torch.equal(b, expected[n]) for n, b in request.identity_bounds.items())

    def test_without_a_symmetry_nobody_aligns(self):
        for align in ("client", "server"):
            assert accept(fusing("fedavg", align), 1, plain_update(1)) is None


class TestFuse:
    @pytest.mark.parametrize("recipe", ["fedavg", "regmean"])
    def test_is_the_fusion_of_what_it_accepted(self, recipe):
        anchor, made = state(0), gram_update if recipe == "regmean" else plain_update
        stage = fusing(recipe, "off", blocks=BLOCKS)
        for node in (1, 2, 3):
            assert accept(stage, node, made(node)) is None
        weighting = RECIPES[recipe].weighting
        ridge = weighting.ridge if weighting else None
        expected = fuse(anchor, [made(n) for n in (1, 2, 3)], ridge)
        assert_same(stage.finish(), expected)

    @pytest.mark.parametrize("align", ["client", "server"])
    def test_a_refusal_leaves_no_trace(self, align):
        stage = fusing("regmean", align, SYMMETRY, BLOCKS)
        clean = fusing("regmean", align, SYMMETRY, BLOCKS)
        bad = gram_update(2)
        bad.parameters["second.weight"][0, 0] = float("nan")
        accept(stage, 1, gram_update(1))
        with pytest.raises(Refusal) as refused:
            accept(stage, 2, bad)
        assert refused.value.outcome is Outcome.non_finite
        accept(clean, 1, gram_update(1))
        assert_same(stage.finish(), clean.finish())

    def test_where_nobody_knows_the_blocks_the_first_client_decides(self):
        stage = fusing("regmean", "off")
        with pytest.raises(Refusal) as nothing:
            accept(stage, 1, plain_update(1))
        assert nothing.value.outcome is Outcome.missing_statistic
        accept(stage, 2, gram_update(2))
        with pytest.raises(Refusal) as fewer:
            accept(stage, 3, Update(state(3), 5.0, {BLOCKS[0]: Gram(torch.eye(5))}))
        assert fewer.value.outcome is Outcome.missing_statistic

    def test_a_recipe_without_statistics_takes_none(self):
        stage = fusing("fedavg", "off", blocks=BLOCKS)
        with pytest.raises(Refusal) as refused:
            accept(stage, 1, gram_update(1))
        assert refused.value.outcome is Outcome.unexpected_statistic

    def test_no_clients_leave_the_anchor(self):
        assert_same(fusing("fedavg", "off").finish(), state(0))


class TestAlignedFuse:
    def test_undoes_what_was_planted_in_weights_and_statistics(self):
        anchor = state(0)
        updates = [Update(perturb(anchor, n), u.examples, u.precisions) for n, u in numbered()]
        planted = [random(SYMMETRY, torch.Generator().manual_seed(n)) for n, _ in numbered()]
        assert not any(g.is_identity for g in planted)
        stage = fusing("regmean", "server", SYMMETRY, BLOCKS)
        for node, (update, g) in enumerate(zip(updates, planted, strict=True)):
            report = accept(stage, node, update.apply(g))
            assert report.distance_after < report.distance_before
        assert_same(stage.finish(), fuse(anchor, updates, RECIPES["regmean"].weighting.ridge))

    def test_a_client_that_is_near_is_certified(self):
        anchor = state(0)
        stage = fusing("fedavg", "server", SYMMETRY)
        report = accept(stage, 1, Update(perturb(anchor, 1, 1e-3), 1.0))
        assert [space.certified for space in report.spaces] == [True]


def numbered():
    return [(n, gram_update(n)) for n in (1, 2, 3)]


def test_a_diagonal_goes_with_a_permutation_but_not_unasked():
    stage = fusing("fisher", "off", blocks=[("first.weight",)])
    accept(stage, 1, Update(state(1), 1.0, {("first.weight",): Diagonal(torch.ones(6, 4))}))
    with pytest.raises(Refusal):
        accept(stage, 2, Update(state(2), 1.0, {("first.bias",): Diagonal(torch.ones(6))}))


def batch_norm(name, learned, measured):
    sizes = {"weight": learned, "bias": learned, "running_mean": measured, "running_var": measured}
    return {f"{name}.{key}": torch.ones(size) for key, size in sizes.items()}


WITH_NORMS = {**state(0), "norm": torch.ones(6), **batch_norm("bn", 4, 4), **batch_norm("odd", 4, 5)}
ORDERS = {
    "none": (Outcome.missing_statistic, None),
    "empty": (Outcome.malformed, LayerGraph(())),
    "an empty level": (Outcome.malformed, LayerGraph(((),))),
    "a tensor that is not there": (Outcome.malformed, LayerGraph(((("x",),),))),
    "a vector": (Outcome.malformed, LayerGraph(((("norm",),),))),
    "a counter": (Outcome.malformed, LayerGraph(((("count",),),))),
    "no tensor at all": (Outcome.malformed, LayerGraph((((),),))),
    "a weight with another's bias": (Outcome.malformed, LayerGraph(((("second.weight", "first.bias"),),))),
    "a layer twice": (Outcome.malformed, LayerGraph(((BLOCKS[0],), (BLOCKS[0],)))),
    "a head that is not in it": (Outcome.malformed, LayerGraph(((BLOCKS[0],),), BLOCKS[1])),
    "a norm that is not there": (Outcome.malformed, LayerGraph(((BLOCKS[0],),), norms=(BatchNorm("first", 1e-5),))),
    "a norm without eps": (Outcome.malformed, LayerGraph(((BLOCKS[0],),), norms=(BatchNorm("bn", 0.0),))),
    "a norm of two sizes": (Outcome.malformed, LayerGraph(((BLOCKS[0],),), norms=(BatchNorm("odd", 1e-5),))),
}


@pytest.mark.parametrize(("outcome", "layer_graph"), ORDERS.values(), ids=ORDERS)
def test_an_order_that_names_no_layers_of_the_model_is_refused(outcome, layer_graph):
    stage = Fuse(WITH_NORMS, RECIPES["features"], Request("", layer_graph=True))
    weights = perturb(floating(WITH_NORMS), 9)
    with pytest.raises(Refusal) as refused:
        accept(stage, 1, Update(weights, 1.0, layer_graph=layer_graph))
    assert refused.value.outcome is outcome
    assert stage.layer_graph is None
    honest = LayerGraph(((BLOCKS[0],), (BLOCKS[1],)), BLOCKS[1], (BatchNorm("bn", 1e-5),))
    accept(stage, 2, Update(weights, 1.0, layer_graph=honest))
    assert stage.layer_graph == honest
    torch.testing.assert_close(stage.finish()["norm"], weights["norm"])


def test_the_first_clients_order_counts():
    stage = Fuse(WITH_NORMS, RECIPES["features"], Request("", layer_graph=True))
    weights = perturb(floating(WITH_NORMS), 9)
    accept(stage, 1, Update(weights, 1.0, layer_graph=LayerGraph(((BLOCKS[0],), (BLOCKS[1],)))))
    accept(stage, 2, Update(weights, 1.0, layer_graph=LayerGraph(((BLOCKS[1],), (BLOCKS[0],)))))
    assert stage.layer_graph == LayerGraph(((BLOCKS[0],), (BLOCKS[1],)))
