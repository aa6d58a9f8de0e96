"""Encodings of the statistics in each stage of a round, within a budget of bytes."""

from collections.abc import Collection, Sequence

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.compression.budget import choose
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.fusion.weighting import Statistic
from fedbasin.strategies.recipes import LayerRefit, Recipe


def fuse_encodings(recipe: Recipe, layers: Sequence[Layer], budget: int) -> dict[Block, Encoding]:
    """Choose the encodings of the Gram matrices that are sent with the weights; empty without a budget.

    Args:
        recipe: recipe of the round; there are no encodings if it needs no Gram matrices.
        layers: layers of the model.
        budget: bytes of a round; 0 for no bound.

    Raises:
        BudgetError: the cheapest forms are above the budget.
    """
    if not budget or recipe.statistic is not Statistic.gram:
        return {}
    return choose(layers, budget, cross_moments=False, sketches=recipe.shrink == 1)


def fit_encodings(layers: Sequence[Layer], budget: int, blocks: Collection[Block]) -> dict[Block, Encoding]:
    """Choose the encodings of the sums for the layers of a refit; raises as `fuse_encodings`."""
    if not budget:
        return {}
    return choose([layer for layer in layers if layer.block in blocks], budget, cross_moments=True)


def check_budget(recipe: Recipe, layers: Sequence[Layer], budget: int) -> None:
    """Check the budget before the run, as far as possible without the clients' layer graphs.

    Raises:
        BudgetError: the cheapest forms are above the budget.
    """
    fuse_encodings(recipe, layers, budget)
    if recipe.refit is not None:
        # Only clients see which layer is the head; in nearly every model it is the last one.
        fitted = layers if isinstance(recipe.refit, LayerRefit) else layers[-1:]
        fit_encodings(layers, budget, [layer.block for layer in fitted])
