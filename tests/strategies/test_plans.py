"""What a round asks, one stage after the other, for every recipe and grouping."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from fedbasin.proto.layer_graph import LayerGraph
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import Evidence
from fedbasin.strategies.recipes import RECIPES, Recipe, Target
from fedbasin.strategies.round.refit import Fit, Head, Probe
from fedbasin.strategies.round.round import Next, UnknownOrderError, round_plan
from fedbasin.strategies.round.stages import Along, Ask, Fuse

NAMES = ("embed", "blocks.0.q", "blocks.0.k", "blocks.0.out", "blocks.1.q", "blocks.1.out", "head")
EMBED, Q, K, OUT, NEXT_Q, NEXT_OUT, HEAD = ((f"{n}.weight", f"{n}.bias") for n in NAMES)
ORDER = LayerGraph(((EMBED,), (Q, K), (OUT,), (NEXT_Q,), (NEXT_OUT,), (HEAD,)), HEAD)
LEVELS = [(EMBED,), (Q, K), (OUT,), (NEXT_Q,), (NEXT_OUT,), (HEAD,)]
BLOCKS = [(EMBED, Q, K), (OUT, NEXT_Q, NEXT_OUT), (HEAD,)]


def model(value):
    tensors = {f"{n}.weight": torch.full((2, 2), value) for n in NAMES}
    return tensors | {f"{n}.bias": torch.full((2,), value) for n in NAMES} | {"norm": torch.ones(2)}


@dataclass(frozen=True)
class Said:
    """What a driver of a plan sends."""

    model: dict[str, Tensor]
    nodes: list[int]
    layer_graph: LayerGraph | None = None
    curve: Path | None = None


@dataclass
class Driven:
    """A plan driven to its end; every stage moves its layers to minus its own number, and loses a client."""

    recipe: Recipe
    grouping: str = "layer"
    layer_graph: LayerGraph | None = ORDER
    curve: Path | None = None
    asked: list[Next] = field(default_factory=list)

    def __post_init__(self):
        fuse = Fuse(model(0.0), self.recipe, Ask(layer_graph=True, keep=True))
        plan = round_plan(model(0.0), self.recipe, lambda: fuse, self.grouping)
        state, step = model(0.0), next(plan)
        try:
            while True:
                self.asked.append(step)
                fit = step.make().ask.fit
                moved = {n: torch.full_like(state[n], -float(len(self.asked))) for b in (fit.blocks if fit else ()) for n in b}  # fmt: skip
                state = {**state, **moved}
                nodes = list(range(10 - len(self.asked)))
                step = plan.send(Said(state, nodes, self.layer_graph, self.curve))
        except StopIteration as end:
            self.result, self.gain = end.value.model, end.value.gain

    @property
    def stages(self):
        return [step.make() for step in self.asked]

    @property
    def fittings(self):
        return [stage.ask.fit for stage in self.stages[1:]]


SEQUENCES = {
    ("fedavg", "layer"): ["fuse"],
    ("fedavgm", "layer"): ["fuse"],
    ("fisher", "layer"): ["fuse"],
    ("kfac", "layer"): ["fuse"],
    ("regmean", "block"): ["fuse"],
    ("regmean++", "layer"): ["fuse"] + 6 * ["fit"],
    ("regmean++", "block"): ["fuse"] + 3 * ["fit"],
    ("features", "layer"): ["fuse"] + 6 * ["fit"],
    ("features", "block"): ["fuse"] + 3 * ["fit"],
    ("head", "layer"): ["fuse", "head"],
    ("head", "block"): ["fuse", "head"],
    ("features-head", "layer"): ["fuse"] + 5 * ["fit"] + ["head"],
    ("features-head", "block"): ["fuse"] + 2 * ["fit"] + ["head"],
    ("auto", "layer"): ["fuse"] + 5 * ["fit"] + ["head", "probe", "probe"],
    ("auto-head", "layer"): ["fuse", "head", "probe", "probe"],
    ("auto", "block"): ["fuse"] + 2 * ["fit"] + ["head", "probe", "probe"],
}


@pytest.mark.parametrize(("recipe", "grouping"), SEQUENCES, ids=map("-".join, SEQUENCES))
def test_a_recipe_is_this_sequence_of_stages(recipe, grouping):
    driven = Driven(RECIPES[recipe], grouping)
    assert [stage.name for stage in driven.stages] == SEQUENCES[recipe, grouping]


def test_every_recipe_has_its_sequence():
    # Those for adapters are one stage, and need a model that has some.
    assert {r for r, _ in SEQUENCES} == {n for n, r in RECIPES.items() if r.adapters is None}


@pytest.mark.parametrize(("grouping", "groups"), [("layer", LEVELS), ("block", BLOCKS)])
def test_layers_are_fitted_in_their_order_and_their_groups(grouping, groups):
    fittings = Driven(RECIPES["features"], grouping).fittings
    assert [fitting.blocks for fitting in fittings] == groups
    assert [fitting.sequence for fitting in fittings] == list(range(len(groups)))
    assert {fitting.target for fitting in fittings} == {Target.features}


def test_a_head_to_labels_comes_last_and_is_fitted_to_nothing_else():
    fittings = Driven(RECIPES["features-head"]).fittings
    assert [fitting.blocks for fitting in fittings] == LEVELS
    assert [fitting.target for fitting in fittings] == 5 * [Target.features] + [Target.labels]


def test_a_head_that_stands_beside_other_layers_leaves_their_level():
    beside = LayerGraph(((EMBED,), (OUT, HEAD)), HEAD)
    fittings = Driven(RECIPES["features-head"], layer_graph=beside).fittings
    assert [fitting.blocks for fitting in fittings] == [(EMBED,), (OUT,), (HEAD,)]


def test_names_without_numbers_are_blocks_of_their_own():
    plain = LayerGraph(tuple(((f"{n}.weight",),) for n in ("one", "two", "three")))
    recipe = RECIPES["features"]
    steps = {f"{n}.weight": torch.zeros(2, 2) for n in ("one", "two", "three")}
    plan = round_plan({}, recipe, lambda: Fuse(steps, recipe, Ask()), "block")
    next(plan)
    asked = plan.send(Said(steps, [1], plain))
    assert asked.make().ask.fit.blocks == (("one.weight",),)


def blockwise(*names):
    """The names of the layers that a stage fits, for levels of these names."""
    layer_graph = LayerGraph(tuple(((name,),) for name in names))
    said = Said({name: torch.zeros(2, 2) for name in names}, [1], layer_graph)
    plan = round_plan({}, RECIPES["features"], lambda: None, "block")
    next(plan)
    found = []
    try:
        answer = said
        while True:
            fitting = plan.send(answer).make().ask.fit
            found.append([name for (name,) in fitting.blocks])
            answer = replace(said, layer_graph=None)
    except StopIteration:
        return found


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


@pytest.mark.parametrize("recipe", ["features", "features-head", "auto"])
def test_a_stage_brings_all_of_the_model_first_and_then_what_is_new(recipe):
    driven = Driven(RECIPES[recipe])
    first, second, *later = driven.asked
    assert first.carries is None
    assert second.carries.keys() == model(0.0).keys()
    for step, before in zip(later, driven.fittings, strict=False):
        assert step.carries.keys() == {name for block in before.blocks for name in block}


def test_a_stage_builds_on_the_one_before():
    driven = Driven(RECIPES["features"])
    for number, step in enumerate(driven.asked[2:], start=2):
        assert {float(t.mean()) for t in step.carries.values()} == {-float(number)}
    assert torch.equal(driven.result["head.weight"], torch.full((2, 2), -7.0))


def test_a_piece_that_a_client_has_completes_what_it_had():
    driven = Driven(RECIPES["auto"])
    have = {}
    for step, fitting in zip(driven.asked[1:], driven.fittings, strict=True):
        have = dict(step.carries) if not fitting.sequence else {**have, **step.carries}
    for name, tensor in driven.stages[-1].finish().items():
        assert torch.equal(have[name], tensor)


def test_only_the_clients_that_were_accepted_are_asked_on():
    asked = [step.nodes for step in Driven(RECIPES["features"]).asked]
    assert asked == [None, *(list(range(10 - number)) for number in range(1, 7))]


def test_every_attempt_has_a_fresh_stage():
    for step in Driven(RECIPES["auto"]).asked[1:]:
        assert step.make() is not step.make()


def regularisers(recipe):
    stages = [s for s in Driven(recipe).stages if isinstance(s, Fit | Head)]
    return [
        (stage._ridge, stage._share) if isinstance(stage, Fit) else stage._ridge for stage in stages
    ]


def test_layers_are_fitted_with_the_recipes_strength_and_share_and_a_head_with_its_own():
    recipe = RECIPES["features-head"]
    body = (Ridge(recipe.ridge.strength, "anchor"), 0.5)
    assert regularisers(recipe) == [*5 * [body], Evidence()]
    assert regularisers(RECIPES["head"]) == [Evidence()]
    assert regularisers(RECIPES["head"].regularised(0.5)) == [Ridge(0.5, "anchor")]


class TestProbe:
    def driven(self, losses, reach=0.0):
        """The fused model is 0 everywhere, the fitted one is -7 in the head."""
        points = (0.0, 0.25, 0.5, 0.75, 1.0)
        path = Path(points, losses, (0.0,) * 5, 1.0)
        return Driven(replace(RECIPES["auto"], reach=reach), curve=path)

    def test_evaluates_the_path_to_the_fitted_model(self):
        stage = self.driven((5, 4, 3, 2, 1)).stages[-1]
        assert isinstance(stage, Probe)
        assert (stage.ask.path_points, stage.ask.fit.sequence) == (5, 6)
        assert stage.ask.fit.along == Along()

    @pytest.mark.parametrize(
        ("losses", "share"), [((5, 4, 3, 2, 1), 1.0), ((1, 2, 3, 4, 5), 0.0), ((4, 1, 0, 1, 4), 0.5)]
    )  # fmt: skip
    def test_the_round_ends_in_its_best_point(self, losses, share):
        found = self.driven(losses).result
        assert torch.equal(found["head.weight"], torch.full((2, 2), -7.0 * share))
        assert torch.equal(found["norm"], torch.ones(2))

    def test_a_reach_looks_beyond_that_point_from_where_the_round_began(self):
        driven = self.driven((4, 3, 2, 1, 0), reach=3.0)
        first, second = (stage.ask.fit.along for stage in driven.stages[-2:])
        assert (first, second) == (Along(), Along(1.0, 3.0))
        # To -7 and on, to three times as far.
        assert torch.equal(driven.result["head.bias"], torch.full((2,), -21.0))
        assert driven.asked[-1].carries == {}

    def test_nobodys_word_leaves_the_fused_model_and_gains_nothing(self):
        driven = Driven(RECIPES["auto"])
        assert not driven.result["head.weight"].any()
        assert driven.gain == 0

    @pytest.mark.parametrize("reach", [0.0, 3.0])
    @pytest.mark.parametrize(
        ("losses", "gain"), [((4, 3, 1, 2, 3), 0.75), ((8, 5, 6, 7, 8), 0.375)]
    )
    def test_the_gain_is_the_share_of_the_fused_models_loss_that_is_gone(self, losses, gain, reach):
        assert self.driven(losses, reach=reach).gain == gain

    def test_a_round_does_not_stay_where_it_began(self):
        driven = self.driven((1, 2, 3, 4, 5), reach=3.0)
        # Nothing is better than the fused model, and nothing ahead of the global one than its nearest point.
        assert driven.stages[-1].ask.fit.along == Along(0.0, 3.0)
        assert driven.gain == -1.0

    def test_a_recipe_that_does_not_probe_knows_no_gain(self):
        assert Driven(RECIPES["features-head"]).gain is None


@pytest.mark.parametrize("layer_graph", [None, LayerGraph(())])
@pytest.mark.parametrize("recipe", ["features", "head", "auto"])
def test_a_model_without_layers_that_fit_is_refused_by_the_recipes_name(recipe, layer_graph):
    with pytest.raises(
        UnknownOrderError, match=f"recipe {recipe!r} fits .* choose the recipe fedavg"
    ):
        Driven(RECIPES[recipe], layer_graph=layer_graph)


def test_a_recipe_of_a_head_needs_a_model_that_has_one():
    headless = replace(ORDER, head=None)
    with pytest.raises(UnknownOrderError, match="a last linear layer"):
        Driven(RECIPES["features-head"], layer_graph=headless)
    assert len(Driven(RECIPES["features"], layer_graph=headless).asked) == 7
