import pytest

from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import Evidence
from fedbasin.strategies.fusion.rules.robust.median import Median
from fedbasin.strategies.fusion.weighting import (
    FisherWeighting,
    GramWeighting,
    KroneckerWeighting,
    SketchedGramWeighting,
    Statistic,
)
from fedbasin.strategies.recipes import (
    RECIPES,
    HeadRefit,
    LayerRefit,
    LoraAlternating,
    LoraFactors,
    LoraProducts,
    Recipe,
    Target,
)
from fedbasin.strategies.server_optimizers import Momentum, Replace

FUSIONS = (
    None,
    FisherWeighting(Ridge()),
    KroneckerWeighting(Ridge()),
    GramWeighting(Ridge()),
    LoraProducts(SketchedGramWeighting(Ridge())),
)
# Kind and regulariser of the fusion; target, regulariser, fraction and head of the refit; points and
# extrapolation of the probe, or points between the mean and the recipe's model; server optimizer.
MEAN = (type(None), None)
SEARCH = (5, 2.0)
HALF_FEATURES = (Target.features, 1e-1, 0.5, Evidence())
CATALOGUE = {
    "fedavg": (MEAN, None, None, Replace(1.0)),
    "fedavgm": (MEAN, None, None, Momentum(0.7, 1.0)),
    "fisher": ((FisherWeighting, 1e-3), None, None, Replace(1.0)),
    "kfac": ((KroneckerWeighting, 1e-3), None, 5, Replace(1.0)),
    "regmean": ((GramWeighting, 1e-3), None, 5, Replace(1.0)),
    "regmean++": (MEAN, (Target.weights, 1e-2, 1.0, None), 5, Replace(1.0)),
    "features": (MEAN, (Target.features, 3e-3, 1.0, None), 5, Replace(1.0)),
    "head": (MEAN, (Evidence(),), 5, Replace(1.0)),
    "auto-features": (MEAN, HALF_FEATURES, SEARCH, Replace(1.0)),
    "auto": (MEAN, (Evidence(),), SEARCH, Replace(1.0)),
    "features-head": (MEAN, HALF_FEATURES, 5, Replace(1.0)),
    "deep-analytic": (MEAN, (Evidence(),), None, Replace(1.0)),
    "lora": ((LoraProducts, SketchedGramWeighting, 1e-2), None, 5, Replace(1.0)),
    "lora-products": ((LoraProducts, *MEAN), None, None, Replace(1.0)),
    "lora-factors": ((LoraFactors, *MEAN), None, None, Replace(1.0)),
    "lora-rotated": ((LoraFactors, *MEAN), None, None, Replace(1.0)),
    "ffa-lora": ((LoraFactors, *MEAN), None, None, Replace(1.0)),
    "rolora": ((LoraFactors, *MEAN), None, None, Replace(1.0)),
    "lora-gram": ((LoraProducts, GramWeighting, 1e-2), None, 5, Replace(1.0)),
    "lorm": ((LoraAlternating, GramWeighting, 1e-3), None, None, Replace(1.0)),
}


def numbers(recipe):
    weighting, refit = recipe.weighting, recipe.refit
    ridge = weighting and weighting.ridge.strength
    fusion = (type(weighting), ridge)
    if recipe.lora is not None:
        fusion = (type(recipe.lora), *fusion)
    fit = None
    if isinstance(refit, LayerRefit):
        fit = (refit.target, refit.ridge, refit.fraction, refit.head)
    elif refit is not None:
        fit = (refit.head,)
    probe = refit and refit.probe
    search = (probe.points, probe.extrapolate) if probe else recipe.points or None
    return fusion, fit, search, recipe.server_optimizer


def test_recipes_stand_under_their_own_names():
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {n: n for n in RECIPES}
    assert RECIPES.keys() == CATALOGUE.keys()


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_named_recipe_has_its_numbers(name):
    recipe = RECIPES[name]
    assert numbers(recipe) == CATALOGUE[name]
    assert recipe.weighting is None or recipe.weighting.ridge.target == "mean"
    assert recipe.shrink == 1


def test_one_recipe_rotates_factors():
    rotating = {name for name, r in RECIPES.items() if r.fusion == LoraFactors(rotate=True)}
    assert rotating == {"lora-rotated"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_whoever_solves_for_layers_regularises_them(recipe):
    assert (recipe.weighting is not None) == (recipe.statistic is not Statistic.none)
    assert recipe.weighting is None or recipe.weighting.ridge.strength > 0
    assert not isinstance(recipe.refit, LayerRefit) or recipe.refit.ridge > 0


@pytest.mark.parametrize(
    ("name", "weights", "layers", "head"),
    [
        ("regmean", 0.5, None, None),
        ("features-head", None, 0.5, Evidence()),
        ("head", None, None, Ridge(0.5, "anchor")),
        ("auto", None, None, Ridge(0.5, "anchor")),
        ("fedavg", None, None, None),
    ],
)
def test_a_head_takes_a_given_strength_where_nothing_else_is_solved_for(name, weights, layers, head):
    recipe = RECIPES[name].override(ridge=0.5)
    refit = recipe.refit
    assert (recipe.weighting and recipe.weighting.ridge.strength) == weights
    assert (refit.ridge if isinstance(refit, LayerRefit) else None) == layers
    assert (refit and refit.head) == head
    assert recipe.regularises == RECIPES[name].regularises == (name != "fedavg")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_overriding_nothing_leaves_a_recipe(recipe):
    assert recipe.override() == recipe


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_layers_are_fitted_to_features_or_weights_and_heads_alone_to_labels(recipe):
    if isinstance(recipe.refit, LayerRefit):
        assert recipe.refit.target in (Target.features, Target.weights)
        assert 0 < recipe.refit.fraction <= 1
    elif recipe.refit is not None:
        assert recipe.refit.head is not None


@pytest.mark.parametrize("align", ["client", "server", "off"])
@pytest.mark.parametrize("refit", [LayerRefit(Target.features), HeadRefit(Ridge())])
def test_what_an_aligned_model_computes_only_its_client_can_say(refit, align):
    recipe = Recipe("mine", refit=refit)
    if align == "server":
        with pytest.raises(ValueError, match=r"recipe 'mine' fits layers.*set align = 'client'"):
            recipe.check_align(align)
    else:
        recipe.check_align(align)


@pytest.mark.parametrize("align", ["client", "server", "off"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_is_collected_on_the_aligned_model_cannot_be_aligned_by_the_server(fusion, align):
    recipe = Recipe("mine", fusion)
    if align == "server" and recipe.statistic in (Statistic.fisher, Statistic.kronecker):
        with pytest.raises(ValueError, match="set align = 'client'"):
            recipe.check_align(align)
    else:
        recipe.check_align(align)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.serves_apart])
def test_a_robust_rule_leaves_a_weighted_mean_to_be_trained_on(name):
    robust = RECIPES[name].override(robust=Median())
    assert robust.serves_apart == (RECIPES[name].refit is not None)
    assert robust.averaging.robust == Median()
