"""The stages of a round, one after the other, for every recipe, grouping and kind of start."""

from dataclasses import dataclass, field, replace
from math import inf

import pytest
import torch

from fedbasin import DeepAnalytic
from fedbasin.proto.encoding import Encoding, GramForm, GramKind
from fedbasin.proto.layer_graph import BatchNorm, LayerGraph
from fedbasin.proto.report import ClientReport, PathSums, StageReport
from fedbasin.proto.request import PathSpec, Request
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge
from fedbasin.strategies.fusion.head import Evidence
from fedbasin.strategies.recipes import RECIPES, LayerRefit, Recipe
from fedbasin.strategies.round.bootstrap import Bootstrap
from fedbasin.strategies.round.choice import best_ahead
from fedbasin.strategies.round.fit_plan import plan_refits, refit_stage
from fedbasin.strategies.round.fuse import Fuse
from fedbasin.strategies.round.refit import ProbePath, RefitHead, RefitLayers
from fedbasin.strategies.round.round import run_round
from fedbasin.strategies.round.round_stages import RoundStages
from fedbasin.strategies.round.stage import StagePlan, StageResult
from tests import tiny

NAMES = ("embed", "blocks.0.q", "blocks.0.k", "blocks.0.out", "blocks.1.q", "blocks.1.out", "head")
EMBED, Q, K, OUT, NEXT_Q, NEXT_OUT, HEAD = ((f"{n}.weight", f"{n}.bias") for n in NAMES)
ORDER = LayerGraph(((EMBED,), (Q, K), (OUT,), (NEXT_Q,), (NEXT_OUT,), (HEAD,)), HEAD)
LEVELS = [(EMBED,), (Q, K), (OUT,), (NEXT_Q,), (NEXT_OUT,), (HEAD,)]
BLOCKS = [(EMBED, Q, K), (OUT, NEXT_Q, NEXT_OUT), (HEAD,)]


def model(value):
    tensors = {f"{n}.weight": torch.full((2, 2), value) for n in NAMES}
    return tensors | {f"{n}.bias": torch.full((2,), value) for n in NAMES} | {"norm": torch.ones(2)}


NODES = list(range(10))
# Recipes whose layers are fitted and taken, whatever clients say.
FEATURES, FEATURES_HEAD, HEAD_ALONE = (RECIPES[name].uncompared for name in ("features", "features-head", "head"))


def result_of(state, nodes, layer_graph=None, path=None, average=None):
    """The result of a stage in which these clients were accepted."""
    clients = tuple(ClientReport(node, "accepted", examples=10.0) for node in nodes)
    report = StageReport("a stage", clients=clients)
    return StageResult(state, report, path=path, layer_graph=layer_graph, average=average)


def stages_of(recipe, grouping="layer", **more):
    request = Request("", layer_graph=True, keep=True)
    return RoundStages(fuse=lambda anchor: Fuse(anchor, recipe, request), grouping=grouping, **more)


@dataclass
class Driven:
    """A round driven to its end; every stage moves its layers to minus its own number, and loses a client."""

    recipe: Recipe
    grouping: str = "layer"
    layer_graph: LayerGraph | None = ORDER
    path: PathSums | None = None
    extended: PathSums | None = None
    trial: PathSums | None = None
    scaled: PathSums | None = None
    encode: object = None
    shortfall: float = 0.0
    own_refit: LayerRefit | None = None
    plans: list[StagePlan] = field(default_factory=list)

    def __post_init__(self):
        # Longer steps have tests of their own.
        self.recipe = replace(self.recipe, step=None)
        stages = stages_of(
            self.recipe, self.grouping, encode=self.encode, shortfall=self.shortfall, own_refit=self.own_refit
        )
        steps = run_round(model(0.0), self.recipe, stages, NODES)
        state, plan = model(0.0), next(steps)
        try:
            while True:
                self.plans.append(plan)
                stage = plan.make()
                request = stage.request
                refit = request.refit
                moved = {n: torch.full_like(state[n], -float(len(self.plans))) for b in (refit.blocks if refit else ()) for n in b}  # fmt: skip
                state = {**state, **moved}
                nodes = NODES[: 10 - len(self.plans)]
                is_extended = self.extended is not None and refit is not None and refit.path == PathSpec(1.0, 3.0)
                path = self.trial if request.stage == "trial" else self.extended if is_extended else self.path
                path = self.scaled if refit is not None and refit.path is not None and refit.path.scaled else path
                plan = steps.send(result_of(state, nodes, self.layer_graph, path, stage.average))
        except StopIteration as end:
            self.end = end.value
            self.result, self.choice, self.left_out = end.value.model, end.value.choice, end.value.left_out

    @property
    def stages(self):
        return [plan.make() for plan in self.plans]

    @property
    def refits(self):
        return [stage.request.refit for stage in self.stages[1:]]

    @property
    def compared(self):
        """The stages before the one that scales the outputs."""
        return [stage for stage in self.stages if not (stage.request.refit and stage.request.refit.path and stage.request.refit.path.scaled)]  # fmt: skip


SEQUENCES = {
    ("fedavg", "layer"): ["fuse"],
    ("fedavgm", "layer"): ["fuse"],
    ("fisher", "layer"): ["fuse"],
    ("kfac", "layer"): ["fuse", "probe", "probe"],
    ("regmean", "block"): ["fuse", "probe", "probe"],
    ("regmean++", "layer"): ["fuse"] + 6 * ["fit"] + ["probe"],
    ("regmean++", "block"): ["fuse"] + 3 * ["fit"] + ["probe"],
    ("features", "layer"): ["fuse"] + 6 * ["fit"] + ["probe"],
    ("features", "block"): ["fuse"] + 3 * ["fit"] + ["probe"],
    ("head", "layer"): ["fuse", "head", "probe"],
    ("head", "block"): ["fuse", "head", "probe"],
    ("features-head", "layer"): ["fuse"] + 5 * ["fit"] + ["head", "probe"],
    ("features-head", "block"): ["fuse"] + 2 * ["fit"] + ["head", "probe"],
    ("auto-features", "layer"): ["fuse"] + 5 * ["fit"] + ["head", "probe", "probe"],
    ("auto", "layer"): ["fuse", "head", "probe", "probe"],
    ("auto-features", "block"): ["fuse"] + 2 * ["fit"] + ["head", "probe", "probe"],
}


@pytest.mark.parametrize(("recipe", "grouping"), SEQUENCES, ids=map("-".join, SEQUENCES))
def test_a_recipe_is_this_sequence_of_stages(recipe, grouping):
    driven = Driven(RECIPES[recipe], grouping)
    assert [stage.request.stage for stage in driven.stages] == SEQUENCES[recipe, grouping]


def test_every_recipe_has_its_sequence():
    # Those for adapters are one stage, and need a model that has some; the blocks of analytic networks have their own.
    assert {recipe for recipe, _ in SEQUENCES} == set(tiny.OF_ANY_MODEL)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_blocks_of_an_analytic_network_are_fitted_one_by_one(depth):
    state = DeepAnalytic(2, 3, 4, depth).state_dict()
    head = LayerGraph((), ("head.weight", "head.bias"))
    assert plan_refits(RECIPES["deep-analytic"].refit, head, "layer", state) == []
    graph = LayerGraph((head.head,), head.head)
    refits = plan_refits(RECIPES["deep-analytic"].refit, graph, "layer", state)
    assert [refit.blocks for refit in refits] == depth * [(head.head,)]
    stages = [refit_stage(RECIPES["deep-analytic"].refit, state, refit, None, Accumulator.zero) for refit in refits]
    assert [stage.request.stage for stage in stages] == (depth - 1) * ["block"] + ["head"]


@pytest.mark.parametrize(("grouping", "groups"), [("layer", LEVELS), ("block", BLOCKS)])
def test_layers_are_fitted_in_their_order_and_their_groups(grouping, groups):
    refits = Driven(FEATURES, grouping).refits
    assert [refit.blocks for refit in refits] == groups
    assert [refit.sequence for refit in refits] == list(range(len(groups)))
    assert {refit.target for refit in refits} == {"features"}


def test_a_head_to_labels_comes_last_and_is_fitted_to_nothing_else():
    refits = Driven(FEATURES_HEAD).refits
    assert [refit.blocks for refit in refits] == LEVELS
    assert [refit.target for refit in refits] == 5 * ["features"] + ["labels"]


def test_a_head_that_stands_beside_other_layers_leaves_their_level():
    beside = LayerGraph(((EMBED,), (OUT, HEAD)), HEAD)
    refits = Driven(FEATURES_HEAD, layer_graph=beside).refits
    assert [refit.blocks for refit in refits] == [(EMBED,), (OUT,), (HEAD,)]


def test_names_without_numbers_are_blocks_of_their_own():
    plain = LayerGraph(tuple(((f"{n}.weight",),) for n in ("one", "two", "three")))
    recipe = FEATURES
    steps = {f"{n}.weight": torch.zeros(2, 2) for n in ("one", "two", "three")}
    plans = run_round(steps, recipe, stages_of(recipe, "block"), NODES)
    next(plans)
    plan = plans.send(result_of(steps, [1], plain))
    assert plan.make().request.refit.blocks == (("one.weight",),)


def blockwise(*names):
    """The names of the layers that a stage fits, for levels of these names."""
    layer_graph = LayerGraph(tuple(((name,),) for name in names))
    state = {name: torch.zeros(2, 2) for name in names}
    recipe = FEATURES
    steps = run_round(state, recipe, stages_of(recipe, "block"), NODES)
    next(steps)
    layers = []
    try:
        result = result_of(state, [1], layer_graph)
        while True:
            refit = steps.send(result).make().request.refit
            layers.append([name for (name,) in refit.blocks])
            result = result_of(state, [1])
    except StopIteration:
        return layers


def test_twelve_blocks_are_fourteen_stages_with_embedding_head_and_training():
    parts = ("attention.query", "attention.output", "mlp.up", "mlp.down")
    names = [f"blocks.{block}.{part}.weight" for block in range(12) for part in parts]
    found = blockwise("embedding.weight", *names, "head.weight")
    assert 1 + len(found) == 14
    assert found[0] == ["embedding.weight", "blocks.0.attention.query.weight"]
    assert found[1][0] == "blocks.0.attention.output.weight"
    assert found[1][-1] == "blocks.1.attention.query.weight"
    assert found[-1] == ["head.weight"]


def test_a_numbered_layer_inside_a_block_is_no_block():
    parts = ("attn.weight", "mlp.0.weight", "mlp.2.weight")
    names = [f"encoder.layer_{block}.{part}" for block in range(3) for part in parts]
    assert [len(stage) for stage in blockwise(*names)] == [1, 3, 5]


@pytest.mark.parametrize("recipe", ["features", "features-head", "auto-features"])
def test_a_stage_brings_all_of_the_model_first_and_then_what_is_new(recipe):
    driven = Driven(RECIPES[recipe] if RECIPES[recipe].chooses else RECIPES[recipe].uncompared)
    first, second, *later = driven.plans
    assert first.carries.keys() == model(0.0).keys()
    assert (first.trains, first.may_fail) == (True, False)
    # A recipe that compares goes on with the mean where a stage fails.
    assert {plan.may_fail for plan in (second, *later)} == {RECIPES[recipe].chooses}
    assert not any(plan.trains for plan in (second, *later))
    assert second.carries.keys() == model(0.0).keys()
    for step, before in zip(later, driven.refits, strict=False):
        assert step.carries.keys() == {name for block in before.blocks for name in block}


def test_a_stage_builds_on_the_one_before():
    driven = Driven(FEATURES)
    for number, step in enumerate(driven.plans[2:], start=2):
        assert {float(t.mean()) for t in step.carries.values()} == {-float(number)}
    assert torch.equal(driven.result["head.weight"], torch.full((2, 2), -7.0))


def test_a_piece_that_a_client_has_completes_what_it_had():
    driven = Driven(RECIPES["auto-features"])
    have = {}
    for step, refit in zip(driven.plans[1:], driven.refits, strict=True):
        have = dict(step.carries) if not refit.sequence else {**have, **step.carries}
    for name, tensor in driven.stages[-1].finish().items():
        assert torch.equal(have[name], tensor)


def test_only_the_clients_that_were_accepted_are_asked_on():
    nodes = [step.nodes for step in Driven(FEATURES).plans]
    assert nodes == [None, *(NODES[: 10 - number] for number in range(1, 7))]


def test_every_attempt_has_a_fresh_stage():
    for step in Driven(RECIPES["auto-features"]).plans[1:]:
        assert step.make() is not step.make()


def regularisers(recipe):
    stages = [s for s in Driven(recipe).stages if isinstance(s, RefitLayers | RefitHead)]
    return [(stage._ridge, stage._share) if isinstance(stage, RefitLayers) else stage._ridge for stage in stages]


def test_layers_are_fitted_with_the_recipes_strength_and_share_and_a_head_with_its_own():
    recipe = FEATURES_HEAD
    body = (Ridge(recipe.refit.ridge, "anchor"), 0.5)
    assert regularisers(recipe) == [*5 * [body], Evidence()]
    assert regularisers(HEAD_ALONE) == [Evidence()]
    assert regularisers(HEAD_ALONE.override(ridge=0.5)) == [Ridge(0.5, "anchor")]


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.lora is None])
def test_own_starts_have_a_fit_of_all_layers_in_recipes_that_compare(recipe):
    usual, asked = (RECIPES[recipe].refit_of_own_starts(ridge) for ridge in (0.0, 0.5))
    assert (usual is None) == (not RECIPES[recipe].chooses)
    if usual is None:
        return
    assert (usual.fraction, usual.head, usual.probe) == (1.0, RECIPES[recipe].refit.head, RECIPES[recipe].probe)
    # Where the recipe fits no layer but the head, a run's strength is the head's.
    assert asked.ridge == (0.5 if recipe == "auto-features" else usual.ridge)


def trial_of(before, after, examples=10.0):
    return PathSums((0.0, 1.0), (), (10.0 * before, 10.0 * after), (), (0.0, 0.0), examples)


# Steps that lose half of what the fitted model of these tests is ahead of the mean at least.
PAYS = trial_of(2, 2.1)


class TestProbePath:
    def driven(
        self, losses, extrapolate=0.0, correct=(0.0,) * 5, trial=PAYS, shortfall=0.0, extended=None, scaled=None
    ):
        """The fused model is 0 everywhere, the fitted one is -7 in the head; a hundred examples judge them."""
        points = (0.0, 0.25, 0.5, 0.75, 1.0)
        sums = (tuple(100.0 * value for value in values) for values in (losses, correct))
        path = PathSums(points, (), next(sums), (), next(sums), 100.0)
        if extended is not None:
            extended = replace(path, loss_after=tuple(100.0 * loss for loss in extended))
        if scaled is not None:
            scaled = PathSums(points, (), tuple(100.0 * loss for loss in scaled), (), (0.0, *4 * (50.0,)), 100.0)
        refit = RECIPES["auto-features"].refit
        refit = replace(refit, probe=replace(refit.probe, extrapolate=extrapolate))
        recipe = replace(RECIPES["auto-features"], refit=refit)
        return Driven(recipe, path=path, extended=extended, trial=trial, shortfall=shortfall, scaled=scaled)

    def test_evaluates_the_path_to_the_fitted_model(self):
        stage = self.driven((5, 4, 3, 2, 1)).compared[-2]
        assert isinstance(stage, ProbePath)
        assert (stage.request.path_points, stage.request.refit.sequence) == (5, 6)
        assert stage.request.refit.path == PathSpec()

    @pytest.mark.parametrize(
        ("losses", "share"), [((5, 4, 3, 2, 1), 1.0), ((1, 2, 3, 4, 5), 0.0), ((4, 1, 0, 1, 4), 0.5)]
    )  # fmt: skip
    def test_the_round_serves_and_trains_on_its_best_point(self, losses, share):
        driven = self.driven(losses)
        for state in (driven.result, driven.end.served or driven.result):
            assert torch.equal(state["head.weight"], torch.full((2, 2), -7.0 * share))
            assert torch.equal(state["norm"], torch.ones(2))
        origin = "fitted" if share else "average"
        assert (driven.choice.served, driven.choice.trained_on) == (origin, origin)

    def test_the_trial_is_of_the_best_point(self):
        stage = self.driven((4, 1, 0, 1, 4)).compared[-1]
        assert (stage.request.stage, stage.request.path_points) == ("trial", 2)
        assert stage.request.refit.path == PathSpec(0.5)

    def test_extrapolation_looks_beyond_that_point_from_where_the_round_began(self):
        driven = self.driven((4, 3, 2, 1, 0), extrapolate=3.0)
        paths = [stage.request.refit.path for stage in driven.compared[-3:]]
        assert paths == [PathSpec(), PathSpec(1.0, 3.0), PathSpec(1.0, 3.0)]
        # To -7 and on, to three times as far.
        assert torch.equal(driven.result["head.bias"], torch.full((2,), -21.0))
        assert driven.plans[-1].carries == {}

    def test_nobodys_word_leaves_the_fused_model(self):
        driven = Driven(RECIPES["auto-features"])
        assert not driven.result["head.weight"].any()
        assert driven.end.served is driven.choice is None

    @pytest.mark.parametrize(
        "trial",
        [None, trial_of(0, 4), trial_of(2, 2), trial_of(2, 1, examples=0.0)],
        ids=["nobody", "all is lost", "no steps", "no examples"],
    )
    def test_the_mean_is_trained_on_where_steps_from_the_best_point_do_not_pay(self, trial):
        driven = self.driven((4, 3, 2, 1, 0), trial=trial)
        assert not driven.result["head.weight"].any()
        assert torch.equal(driven.end.served["head.weight"], torch.full((2, 2), -7.0))
        assert (driven.choice.served, driven.choice.trained_on) == ("fitted", "average")

    def test_a_model_that_is_less_accurate_than_the_mean_is_not_served(self):
        driven = self.driven((4, 3, 2, 1, 0), correct=(0.5, 0.5, 0.4, 0.2, 0.1))
        assert torch.equal(driven.end.served["head.weight"], torch.full((2, 2), -7.0 / 4))
        assert (driven.choice.loss, driven.choice.accuracy) == (3, 0.5)

    @pytest.mark.parametrize(("shortfall", "slow"), [(3.9, True), (4.1, False), (inf, False)])
    def test_the_mean_is_trained_on_without_a_trial_where_averaging_closes_the_gap(self, shortfall, slow):
        driven = self.driven((4, 3, 2, 1, 1), shortfall=shortfall)
        assert driven.compared[-1].request.stage == ("trial" if slow else "probe")
        assert (driven.choice.served, driven.choice.trained_on) == ("fitted", "fitted" if slow else "average")

    @pytest.mark.parametrize(("start", "slow"), [(4.0, True), (9.0, False)])
    def test_a_first_round_that_has_not_lowered_the_loss_tries_the_best_point(self, start, slow):
        extended = (start, 3.0, 3.0, 3.0, 3.0)
        driven = self.driven((4.0, 3.0, 2.0, 1.0, 0.5), extrapolate=3.0, extended=extended, shortfall=inf)
        assert driven.compared[-1].request.stage == ("trial" if slow else "probe")
        assert driven.choice.trained_on == ("fitted" if slow else "average")

    def test_a_gain_by_chance_leaves_the_mean(self):
        # Less than the standard error: sqrt((2 + 1.85) / 100) is .196.
        driven = self.driven((2.0, 1.85, 1.85, 1.85, 1.85))
        assert driven.end.served is None
        assert (driven.choice.served, driven.choice.trained_on) == ("average", "average")

    def test_a_mean_that_nothing_matches_is_served_without_a_trial(self):
        driven = self.driven((1, 2, 3, 4, 5), extrapolate=3.0)
        assert [stage.request.stage for stage in driven.compared[-2:]] == ["probe", "probe"]
        assert driven.end.served is None
        assert (driven.choice.served, driven.choice.trained_on) == ("average", "average")

    def test_a_recipe_that_does_not_probe_chooses_nothing(self):
        assert Driven(FEATURES_HEAD).choice is None

    @pytest.mark.parametrize(("losses", "origin", "place"), [((4, 3, 1, 2, 3), "fitted", PathSpec(0.5)), ((1, 2, 3, 4, 5), "average", PathSpec(0.0))])  # fmt: skip
    def test_the_outputs_of_the_served_model_are_scaled_to_the_lowest_loss(self, losses, origin, place):
        driven = self.driven(losses, scaled=(2.0, 0.9, 0.4, 0.6, 1.0))
        path = driven.stages[-1].request.refit.path
        assert path == replace(place, scaled=("head.weight", "head.bias"))
        assert (driven.choice.served, driven.choice.scale) == (origin, 0.5)
        assert driven.choice.loss == pytest.approx(0.4)
        assert driven.choice.scale_gain == pytest.approx(min(losses) - 0.4)
        for name in ("head.weight", "head.bias"):
            assert torch.equal(driven.end.served[name], 0.5 * torch.full_like(model(0.0)[name], -7.0 * place.mix))

    def test_the_model_that_is_trained_on_is_not_scaled(self):
        driven = self.driven((4, 3, 2, 1, 0.5), scaled=(2.0, 0.9, 0.1, 0.6, 0.5))
        assert driven.choice.trained_on == "fitted"
        assert torch.equal(driven.result["head.weight"], torch.full((2, 2), -7.0))
        assert torch.equal(driven.end.served["head.weight"], torch.full((2, 2), -3.5))

    @pytest.mark.parametrize("scaled", [None, (0.0, 1.2, 1.1, 1.0, 1.0), (0.0, 0.995, 0.995, 0.995, 1.0)], ids=["nobody", "no gain", "by chance"])  # fmt: skip
    def test_outputs_stay_where_a_scale_gains_nothing(self, scaled):
        driven = self.driven((1, 2, 3, 4, 5), scaled=scaled)
        assert (driven.choice.scale, driven.choice.scale_gain) == (None, 0.0)
        assert driven.end.served is None

    def test_a_task_without_right_and_wrong_is_not_scaled(self):
        driven = self.driven((5, 4, 3, 2, 1), correct=())
        assert len(driven.compared) == len(driven.stages)


class TestProductsPath:
    """Between two means of adapters' products, 0 by examples and 1 weighted by inputs."""

    def driven(self, losses, lost=""):
        steps = run_round(model(0.0), RECIPES["lora"], stages_of(RECIPES["fedavg"]), NODES)
        self.plans = [next(steps)]
        try:
            self.plans.append(steps.send(replace(result_of(model(1.0), NODES), average=model(0.0))))
            self.plans.append(steps.send(replace(result_of(model(0.0), NODES[:5]), failed=lost == "first")))
            path = PathSums((0.0, 0.25, 0.5, 0.75, 1.0), (), losses, (), 5 * (1.0,), 2.0) if losses else None
            steps.send(replace(result_of(model(1.0), NODES[:5], path=path), failed=lost == "second"))
        except StopIteration as end:
            return end.value
        raise AssertionError("the round has a further stage")

    @pytest.mark.parametrize(
        ("losses", "point"), [((5, 4, 3, 2, 1), 1.0), ((1, 2, 3, 4, 5), 0.0), ((4, 1, 0, 1, 4), 0.5)]
    )
    def test_the_point_of_lowest_loss_is_served_and_trained_on(self, losses, point):
        end = self.driven(losses)
        assert {float(tensor.mean()) for name, tensor in end.model.items() if name != "norm"} == {point}
        assert (end.served, end.average) == (None, None)
        assert (end.choice.loss, end.choice.average_loss) == (min(losses) / 2, losses[0] / 2)
        assert (end.choice.served, end.choice.trained_on, end.choice.accuracy) == ("products", "products", 0.5)

    def test_clients_get_both_means_and_then_evaluate_all_points(self):
        self.driven((5, 4, 3, 2, 1))
        _, mean, weighted = self.plans
        assert [float(plan.carries["head.weight"].mean()) for plan in (mean, weighted)] == [0.0, 1.0]
        assert (mean.nodes, weighted.nodes, mean.may_fail, weighted.may_fail) == (NODES, NODES[:5], True, True)
        requests = [plan.make().request for plan in (mean, weighted)]
        assert [(r.stage, r.refit.sequence, r.path_points) for r in requests] == [("probe", 0, 0), ("probe", 1, 5)]

    @pytest.mark.parametrize(("losses", "lost"), [((5, 4, 3, 2, 1), "first"), ((5, 4, 3, 2, 1), "second"), ((), "")])
    def test_the_weighted_mean_stays_where_nobody_can_compare(self, losses, lost):
        end = self.driven(losses, lost)
        assert float(end.model["head.weight"].mean()) == 1.0
        assert end.choice is None


def test_a_recipe_that_fits_layers_goes_on_from_the_better_of_a_mean_and_a_distilled_model():
    steps = run_round(model(0.0), RECIPES["auto"], stages_of(RECIPES["fedavg"]), NODES)
    next(steps)
    steps.send(replace(result_of(model(1.0), NODES, ORDER), average=model(0.0)))
    steps.send(result_of(model(0.0), NODES))
    path = PathSums((0.0, 0.25, 0.5, 0.75, 1.0), (), (4, 3, 2, 1, 5), (), (), 2.0)
    head = steps.send(result_of(model(1.0), NODES, path=path))
    assert head.make().request.stage == "head"
    assert {float(t.mean()) for name, t in head.carries.items() if name != "norm"} == {0.75}


@pytest.mark.parametrize("layer_graph", [None, LayerGraph(())])
@pytest.mark.parametrize("recipe", ["features", "head", "auto-features"])
def test_a_model_without_layers_that_fit_is_fused_and_said_to_have_none(recipe, layer_graph):
    driven = Driven(RECIPES[recipe], layer_graph=layer_graph)
    assert len(driven.plans) == 1
    assert driven.left_out
    assert driven.choice is None


def test_a_model_without_a_head_is_fitted_in_all_other_layers():
    headless = replace(ORDER, head=None)
    driven = Driven(FEATURES_HEAD, layer_graph=headless)
    assert "last layer" in driven.left_out
    assert len(driven.plans) == 7
    assert not Driven(FEATURES, layer_graph=headless).left_out


@pytest.mark.parametrize("has_head", [True, False])
def test_steps_from_the_served_model_need_a_head_that_can_be_fitted_again(has_head):
    recipe = RECIPES["auto-features"]
    path = PathSums((0.0, 1.0), loss_after=(9.0, 1.0), examples=4.0, clients=1)
    graph = ORDER if has_head else replace(ORDER, head=None)
    driven = Driven(recipe, layer_graph=graph, path=path, own_refit=recipe.refit_of_own_starts())
    stages = [stage.request.stage for stage in driven.stages]
    assert stages.count("fit") == (5 if has_head else 6)
    assert ("steps" in stages) == has_head


@pytest.mark.parametrize(("target", "kind"), [("", RefitHead), ("values", RefitLayers)])
def test_the_head_is_fitted_as_the_clients_task_has_it(target, kind):
    stage = Driven(HEAD_ALONE, layer_graph=replace(ORDER, head_target=target)).stages[-1]
    assert isinstance(stage, kind)
    assert stage.request.refit.target == (target or "labels")


def test_the_last_fit_measures_running_statistics_too():
    norms = (BatchNorm("norm", 1e-5),)
    graph = replace(ORDER, norms=norms)
    refits = plan_refits(FEATURES.refit, graph, "layer", {})
    assert [refit.norms for refit in refits] == [*5 * [()], norms]
    (head,) = plan_refits(HEAD_ALONE.refit, graph, "layer", {})
    assert head.norms == norms


def test_how_sums_are_sent_is_chosen_once_for_all_layers_of_the_round():
    asked = []

    def encode(blocks):
        asked.append(list(blocks))
        return {block: Encoding(GramForm(GramKind.sketch, len(block[0]))) for block in blocks}

    stages = Driven(FEATURES, encode=encode).stages[1:]
    layers = [block for level in LEVELS for block in level]
    assert asked == [layers]
    for stage, level in zip(stages, LEVELS, strict=True):
        assert stage.request.encodings == {block: Encoding(GramForm(GramKind.sketch, len(block[0]))) for block in level}


def finish(plans, *results):
    """Answer the plans of a round in turn; returns the plans and the round's result."""
    plan, asked = next(plans), []
    for result in results:
        asked.append(plan)
        try:
            plan = plans.send(result)
        except StopIteration as end:
            return asked, end.value
    raise AssertionError("the round has not ended")


class TestBootstrap:
    def plans(self, *, one_by_one):
        stages = stages_of(RECIPES["fedavg"], bootstrap=Bootstrap, bootstrap_one_by_one=one_by_one)
        return run_round(model(0.0), RECIPES["fedavg"], stages, [1, 2, 3])

    def test_the_anchor_is_looked_for_first_and_then_trained_from(self):
        (first, second), result = finish(
            self.plans(one_by_one=False), result_of(model(1.0), [1, 2, 3]), result_of(model(2.0), [1, 2])
        )
        assert [plan.make().request.stage for plan in (first, second)] == ["bootstrap", "fuse"]
        assert (first.nodes, first.may_fail, first.trains) == ([1, 2, 3], False, False)
        assert (second.nodes, second.may_fail, second.trains) == (None, False, True)
        assert torch.equal(first.carries["head.weight"], model(0.0)["head.weight"])
        assert torch.equal(second.carries["head.weight"], model(1.0)["head.weight"])
        assert torch.equal(result.model["head.weight"], model(2.0)["head.weight"])
        assert result.choice is None

    def test_one_after_the_other_is_asked_until_one_replies(self):
        plans, _ = finish(
            self.plans(one_by_one=True),
            result_of(model(0.0), []),
            result_of(model(1.0), [2]),
            result_of(model(2.0), [1, 2, 3]),
        )
        assert [plan.nodes for plan in plans] == [[1], [2], None]
        assert [plan.may_fail for plan in plans] == [True, True, False]
        assert torch.equal(plans[-1].carries["head.weight"], model(1.0)["head.weight"])

    def test_where_the_last_client_fails_too_so_does_the_round(self):
        plans, _ = finish(
            self.plans(one_by_one=True),
            result_of(model(0.0), []),
            result_of(model(0.0), []),
            result_of(model(1.0), [3]),
            result_of(model(2.0), [3]),
        )
        assert [plan.nodes for plan in plans] == [[1], [2], [3], None]
        assert [plan.may_fail for plan in plans] == [True, True, False, False]


class TestMerge:
    def driven(self, merged):
        calls = []

        def merge(nodes, template):
            calls.append((nodes, template))
            return merged
            yield

        stages = stages_of(RECIPES["fedavg"], merge=merge)
        round_ = run_round(model(0.0), RECIPES["fedavg"], stages, NODES)
        _, result = finish(round_, result_of(model(1.0), [4, 5]))
        ((nodes, template),) = calls
        assert nodes == [4, 5]
        assert torch.equal(template["head.weight"], model(0.0)["head.weight"])
        return float(result.model["head.weight"].mean())

    def test_the_clients_that_trained_are_merged_in_pairs(self):
        assert self.driven(model(3.0)) == 3.0

    def test_where_nobody_can_link_the_round_is_the_mean(self):
        assert self.driven(None) == 1.0


def test_ahead_of_the_start_nobodys_word_takes_the_point_that_was_given():
    path = Path((0.0, 0.5, 1.0), (1.0, 3.0, 2.0), (0.0,) * 3, 1.0)
    assert best_ahead(path, 0.25) == 1.0
    assert best_ahead(None, 0.25) == 0.25
