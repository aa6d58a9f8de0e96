"""The named catalogue: a recipe is a point in matcher x precision x step, a value with a name."""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from fedbasin.strategies.fusion.tally import Ridge


class Statistic(Enum):
    """What a client sends beside its weights and its number of examples."""

    none = "nothing: the number of examples is all that is known"
    fisher = "the diagonal Fisher information of every parameter"
    gram = "the Gram matrix of every linear and convolutional layer's inputs"


class Target(Enum):
    """What a layer is fitted to, on the inputs that the layers fused so far compute."""

    features = "what the client's own model computes there"
    weights = "what the client's own weights make of the same inputs (RegMean++)"
    labels = "the labels: a closed-form head"


@dataclass(frozen=True)
class Recipe:
    """How a round's updates become the next global model.

    Attributes:
        name: as in the configuration.
        statistic: what clients collect, on the aligned model.
        ridge: the regulariser of the fused blocks; None where no statistic is collected.
        shrink: factor on the off-diagonal of Gram matrices (RegMean's alpha); 1 leaves them.
    """

    name: str
    statistic: Statistic = Statistic.none
    ridge: Ridge | None = None
    shrink: float = 1.0

    def check_align(self, align: Literal["client", "server", "off"]) -> None:
        """Check that the statistics can be collected where they are needed.

        Raises:
            ValueError: the server would have to turn a Fisher diagonal.
        """
        if self.statistic is Statistic.fisher and align == "server":
            raise ValueError(
                "align = 'server': a Fisher diagonal cannot follow a rotation and must be collected on "
                "the aligned model; set align = 'client'"
            )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fedavg"),
        Recipe("fisher", Statistic.fisher, Ridge(1e-3)),
        Recipe("regmean", Statistic.gram, Ridge(1e-3)),
    )
}
