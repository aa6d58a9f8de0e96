"""Of the bytes that a client may send in statistics, what each stage of a round gets, layer by layer."""

from collections.abc import Collection, Sequence

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.compression.budget import choose
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.recipes import Recipe, Statistic


def fuse_encodings(recipe: Recipe, layers: Sequence[Layer], budget: int) -> dict[Block, Encoding]:
    """How the Gram matrices that go with the weights are sent; empty where nothing bounds them.

    Args:
        recipe: says whether there are any.
        layers: of the model.
        budget: bytes of a round; 0 for no bound.

    Raises:
        BudgetError: not even the cheapest forms fit.
    """
    if not budget or recipe.statistic is not Statistic.gram:
        return {}
    return choose(layers, budget, moments=False, sketches=recipe.shrink == 1)


def fit_encodings(
    layers: Sequence[Layer], budget: int, blocks: Collection[Block]
) -> dict[Block, Encoding]:
    """How the sums of the layers that a round fits are sent; raises as `fuse_encodings`."""
    if not budget:
        return {}
    return choose([layer for layer in layers if layer.block in blocks], budget, moments=True)


def check_budget(recipe: Recipe, layers: Sequence[Layer], budget: int) -> None:
    """Whether the budget can be kept, as far as that is known before clients say which layers they fit.

    Raises:
        BudgetError: not even the cheapest forms fit.
    """
    fuse_encodings(recipe, layers, budget)
    if recipe.fits:
        # Which layer is the head only clients see; it is the last one of nearly every model.
        fitted = layers if recipe.fit is not None else layers[-1:]
        fit_encodings(layers, budget, [layer.block for layer in fitted])
