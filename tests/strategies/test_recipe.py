import pytest

from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import Evidence
from fedbasin.strategies.recipes import RECIPES, Recipe, Statistic, Target


def test_recipes_stand_under_their_own_names():
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {n: n for n in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_whoever_solves_for_layers_regularises_them(recipe):
    solves = recipe.statistic is not Statistic.none or recipe.fit is not None
    assert (recipe.ridge is not None) == solves
    assert recipe.ridge is None or recipe.ridge.strength > 0


@pytest.mark.parametrize(
    ("name", "body", "head"),
    [
        ("regmean", 0.5, None),
        ("features-head", 0.5, Evidence()),
        ("head", None, Ridge(0.5, "anchor")),
        ("auto-head", None, Ridge(0.5, "anchor")),
        ("fedavg", None, None),
    ],
)
def test_a_head_takes_a_given_strength_where_nothing_else_is_solved_for(name, body, head):
    found = RECIPES[name].regularised(0.5)
    assert (found.ridge and found.ridge.strength, found.head) == (body, head)
    assert found.regularises == RECIPES[name].regularises == (name != "fedavg")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_layers_are_fitted_to_features_or_weights_and_heads_alone_to_labels(recipe):
    assert recipe.fit in (None, Target.features, Target.weights)
    assert recipe.fits == (recipe.fit is not None or recipe.head is not None)
    assert 0 < recipe.share <= 1


@pytest.mark.parametrize("align", ["client", "server", "off"])
@pytest.mark.parametrize(
    "recipe", [Recipe("mine", fit=Target.features), Recipe("mine", head=Ridge())]
)
def test_what_an_aligned_model_computes_only_its_client_can_say(recipe, align):
    if align == "server":
        with pytest.raises(ValueError, match=r"recipe 'mine' fits layers.*set align = 'client'"):
            recipe.check_align(align)
    else:
        recipe.check_align(align)


@pytest.mark.parametrize("align", ["client", "server", "off"])
@pytest.mark.parametrize("statistic", Statistic)
def test_what_is_collected_on_the_aligned_model_cannot_be_aligned_by_the_server(statistic, align):
    recipe = Recipe("mine", statistic)
    if align == "server" and statistic in (Statistic.fisher, Statistic.kronecker):
        with pytest.raises(ValueError, match="set align = 'client'"):
            recipe.check_align(align)
    else:
        recipe.check_align(align)
