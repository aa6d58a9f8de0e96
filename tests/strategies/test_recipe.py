import pytest

from fedbasin.strategies.recipe import RECIPES, Recipe, Statistic


def test_recipes_stand_under_their_own_names():
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {n: n for n in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_whoever_collects_statistics_regularises_them(recipe):
    assert (recipe.ridge is not None) == (recipe.statistic is not Statistic.none)
    assert recipe.ridge is None or recipe.ridge.strength > 0


@pytest.mark.parametrize("align", ["client", "server", "off"])
@pytest.mark.parametrize("statistic", Statistic)
def test_a_fisher_diagonal_alone_cannot_be_aligned_by_the_server(statistic, align):
    recipe = Recipe("mine", statistic)
    if (statistic, align) == (Statistic.fisher, "server"):
        with pytest.raises(ValueError, match="set align = 'client'"):
            recipe.check_align(align)
    else:
        recipe.check_align(align)
