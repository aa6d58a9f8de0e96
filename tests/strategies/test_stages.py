"""What a stage asks, folds and ends in; how its question travels is tested with the rounds."""

import itertools

import pytest
import torch

from fedbasin.strategies.fusion.accumulator import fuse
from fedbasin.strategies.fusion.precisions import Diagonal, Gram
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.recipes import RECIPES, Statistic
from fedbasin.strategies.round.outcomes import Outcome, Refusal
from fedbasin.strategies.round.stages import Ask, Bootstrap, Evaluate, Start, fusing
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.symmetry.transform import random

SYMMETRY = parse("hidden  S(6)  first.weight[0] first.bias[0] second.weight[1]")
BLOCKS = [("first.weight", "first.bias"), ("second.weight",)]


def state(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "first.weight": torch.randn(6, 4, generator=draw),
        "first.bias": torch.randn(6, generator=draw),
        "second.weight": torch.randn(3, 6, generator=draw),
        "count": torch.tensor(seed),
    }


def with_grams(seed):
    draw = torch.Generator().manual_seed(seed)
    rows = {
        b: torch.randn(30, n, generator=draw).double() for b, n in zip(BLOCKS, (5, 6), strict=True)
    }
    return Update(state(seed), 10.0 + seed, {b: Gram(x.T @ x) for b, x in rows.items()})


def near(base, seed, step=0.05):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: t + step * torch.randn(t.shape, generator=draw) if t.is_floating_point() else t
        for name, t in base.items()
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name])


class TestPlan:
    def test_asks_for_the_recipes_statistic(self):
        for recipe in (r for r in RECIPES.values() if r.adapters is None):
            ask = fusing(state(0), recipe, Ask(Start.own, path_points=5), "off").ask
            assert (ask.statistic, ask.start, ask.path_points) == (recipe.statistic, Start.own, 5)

    def test_sends_symmetry_and_radii_only_where_clients_align(self):
        for align in ("client", "server", "off"):
            ask = fusing(state(0), RECIPES["fedavg"], Ask(symmetry=SYMMETRY), align).ask
            assert ask.symmetry == (SYMMETRY if align == "client" else None)
            assert set(ask.radii) == ({"hidden"} if align == "client" else set())

    def test_without_a_symmetry_nobody_aligns(self):
        for align in ("client", "server"):
            assert fusing(state(0), RECIPES["fedavg"], Ask(), align).accept(1, with_none(1)) is None


def with_none(seed):
    return Update(state(seed), 5.0)


class TestFuse:
    @pytest.mark.parametrize("recipe", ["fedavg", "regmean"])
    def test_is_the_fusion_of_what_it_accepted(self, recipe):
        anchor, made = state(0), with_grams if recipe == "regmean" else with_none
        stage = fusing(anchor, RECIPES[recipe], Ask(), "off", BLOCKS)
        for node in (1, 2, 3):
            assert stage.accept(node, made(node)) is None
        expected = fuse(anchor, [made(n) for n in (1, 2, 3)], RECIPES[recipe].ridge)
        assert_same(stage.finish(), expected)

    @pytest.mark.parametrize("align", ["client", "server"])
    def test_a_refusal_leaves_no_trace(self, align):
        stage = fusing(state(0), RECIPES["regmean"], Ask(symmetry=SYMMETRY), align, BLOCKS)
        clean = fusing(state(0), RECIPES["regmean"], Ask(symmetry=SYMMETRY), align, BLOCKS)
        bad = with_grams(2)
        bad.parameters["second.weight"][0, 0] = float("nan")
        stage.accept(1, with_grams(1))
        with pytest.raises(Refusal) as refused:
            stage.accept(2, bad)
        assert refused.value.outcome is Outcome.non_finite
        clean.accept(1, with_grams(1))
        assert_same(stage.finish(), clean.finish())

    def test_where_nobody_knows_the_blocks_the_first_client_decides(self):
        stage = fusing(state(0), RECIPES["regmean"], Ask(), "off")
        with pytest.raises(Refusal) as nothing:
            stage.accept(1, with_none(1))
        assert nothing.value.outcome is Outcome.missing_statistic
        stage.accept(2, with_grams(2))
        with pytest.raises(Refusal) as fewer:
            stage.accept(3, Update(state(3), 5.0, {BLOCKS[0]: Gram(torch.eye(5))}))
        assert fewer.value.outcome is Outcome.missing_statistic

    def test_a_recipe_without_statistics_takes_none(self):
        stage = fusing(state(0), RECIPES["fedavg"], Ask(), "off", BLOCKS)
        with pytest.raises(Refusal) as refused:
            stage.accept(1, with_grams(1))
        assert refused.value.outcome is Outcome.unexpected_statistic

    def test_no_clients_leave_the_anchor(self):
        assert_same(fusing(state(0), RECIPES["fedavg"], Ask(), "off").finish(), state(0))


class TestAlignedFuse:
    def test_undoes_what_was_planted_in_weights_and_statistics(self):
        anchor = state(0)
        updates = [Update(near(anchor, n), u.examples, u.precisions) for n, u in numbered()]
        planted = [random(SYMMETRY, torch.Generator().manual_seed(n)) for n, _ in numbered()]
        assert not any(g.is_identity for g in planted)
        stage = fusing(anchor, RECIPES["regmean"], Ask(symmetry=SYMMETRY), "server", BLOCKS)
        for node, (update, g) in enumerate(zip(updates, planted, strict=True)):
            report = stage.accept(node, update.moved(g))
            assert report.distance_after < report.distance_before
        assert_same(stage.finish(), fuse(anchor, updates, RECIPES["regmean"].ridge))

    def test_a_client_that_is_near_is_certified(self):
        anchor = state(0)
        stage = fusing(anchor, RECIPES["fedavg"], Ask(symmetry=SYMMETRY), "server")
        report = stage.accept(1, Update(near(anchor, 1, 1e-3), 1.0))
        assert [space.certified for space in report.spaces] == [True]


def numbered():
    return [(n, with_grams(n)) for n in (1, 2, 3)]


class TestBootstrap:
    @pytest.mark.parametrize("order", list(itertools.permutations([5, 3, 9])))
    def test_first_is_the_lowest_node_in_any_order_of_arrival(self, order):
        stage = Bootstrap(state(0))
        for node in order:
            stage.accept(node, Update(state(node), 1.0))
        assert torch.equal(stage.finish()["first.weight"], state(3)["first.weight"])

    @pytest.mark.parametrize("order", list(itertools.permutations([5, 3, 9])))
    def test_largest_has_most_examples_in_any_order_of_arrival_and_ties_go_to_the_lowest_node(
        self, order
    ):
        stage = Bootstrap(state(0), "largest")
        for node in order:
            stage.accept(node, Update(state(node), {5: 20.0, 3: 10.0, 9: 20.0}[node]))
        assert torch.equal(stage.finish()["first.weight"], state(5)["first.weight"])

    def test_counters_stay_the_templates(self):
        stage = Bootstrap(state(0))
        stage.accept(3, Update(state(3), 1.0))
        assert stage.finish()["count"] == 0

    @pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3, 4])))
    def test_medoid_is_closest_to_all_others_once_every_pair_is_aligned(self, order):
        centre = state(7)
        models = {1: state(50), 2: near(centre, 2, 0.2), 3: centre, 4: near(centre, 4, 0.2)}
        stage = Bootstrap(state(0), "medoid", SYMMETRY)
        for node in order:
            g = random(SYMMETRY, torch.Generator().manual_seed(node))
            stage.accept(node, Update(g.act(models[node]), 1.0))
        g = random(SYMMETRY, torch.Generator().manual_seed(3))
        assert torch.equal(stage.finish()["first.weight"], g.act(centre)["first.weight"])

    def test_best_has_the_lowest_score_of_the_whole_model(self):
        seen = []

        def score(model):
            seen.append(set(model))
            return -float(model["first.weight"].sum())

        stage = Bootstrap(state(0), "best", score=score)
        for node in (1, 2, 3):
            stage.accept(node, Update(state(node), 1.0))
        best = max((1, 2, 3), key=lambda node: float(state(node)["first.weight"].sum()))
        assert torch.equal(stage.finish()["first.weight"], state(best)["first.weight"])
        assert seen == [set(state(0))] * 3

    def test_a_score_that_is_no_number_never_wins(self):
        scores = {1: float("nan"), 2: 5.0, 3: 4.0}
        stage = Bootstrap(state(0), "best", score=lambda m: scores[int(m["first.bias"][0])])
        for node in scores:
            model = {**state(node), "first.bias": torch.full((6,), float(node))}
            stage.accept(node, Update(model, 1.0))
        assert stage.finish()["first.bias"][0] == 3

    def test_bad_models_are_refused_and_nothing_gives_the_template(self):
        stage = Bootstrap(state(0))
        with pytest.raises(Refusal):
            stage.accept(1, Update({"first.weight": torch.zeros(1)}, 1.0))
        assert_same(stage.finish(), state(0))

    def test_it_keeps_no_view_of_a_reply(self):
        stage, model = Bootstrap(state(0)), state(3)
        stage.accept(3, Update(model, 1.0))
        model["first.weight"].zero_()
        assert stage.finish()["first.weight"].any()

    def test_it_asks_for_own_starts_to_be_kept(self):
        ask = Bootstrap(state(0)).ask
        assert (ask.start, ask.keep, ask.statistic) == (Start.own, True, Statistic.none)


class TestEvaluate:
    def test_ends_in_the_model_that_it_sent(self):
        stage = Evaluate(state(0))
        stage.accept(1, Update({}, 3.0))
        assert_same(stage.finish(), state(0))
        assert stage.kind == "evaluate"

    def test_refuses_a_client_without_examples(self):
        with pytest.raises(Refusal) as refused:
            Evaluate(state(0)).accept(1, Update({}, 0.0))
        assert refused.value.outcome is Outcome.bad_weight


def test_a_diagonal_goes_with_a_permutation_but_not_unasked():
    stage = fusing(state(0), RECIPES["fisher"], Ask(), "off", [("first.weight",)])
    stage.accept(1, Update(state(1), 1.0, {("first.weight",): Diagonal(torch.ones(6, 4))}))
    with pytest.raises(Refusal):
        stage.accept(2, Update(state(2), 1.0, {("first.bias",): Diagonal(torch.ones(6))}))
