"""The named catalogue: a recipe is a point in matcher x precision x step, a value with a name."""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import Evidence
from fedbasin.strategies.server_optimizers import Average, Momentum, Replace, Step


class Statistic(Enum):
    """What a client sends beside its weights and its number of examples."""

    none = "nothing: the number of examples is all that is known"
    fisher = "the diagonal Fisher information of every parameter"
    gram = "the Gram matrix of every linear and convolutional layer's inputs"
    kronecker = "the second moments of every layer's inputs and of the gradients at its outputs"


class Adapters(Enum):
    """How the two factors of low-rank adapters are fused."""

    factors = "each factor as any other tensor"
    rotated = "the same, after turning a client's factors to the anchor's"
    products = "their products, which are then split again"
    alternating = (
        "one at a time, each with the inputs that it is multiplied with; the other is frozen"
    )


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
        ridge: the regulariser of what is solved for, the head apart; None where that is nothing.
        shrink: factor on the off-diagonal of Gram matrices (RegMean's alpha); 1 leaves them.
        fit: what layers are fitted to after fusing, from the input on; None leaves them as they were fused.
        share: of the fitted layers in the result; the rest is as it was fused.
        head: the last layer is fitted to the labels, with this regulariser; None leaves it to the others.
        probe: points of the path from the fused model to the fitted one that clients evaluate; the best is
            taken. 0 takes the fitted model.
        reach: how far clients then look beyond that point, on the line through it from the global model, in
            multiples of its distance; the best point of that line is taken. 0 does not look.
        step: what the fused model does to the global one.
        pays: fitting goes on while it takes at least this share of the fused model's loss away, as the probed
            path says; then the run goes over to `then` for good.
        then: the recipe that takes over.
        adapters: how low-rank adapters are fused, which the model must then have; None for models that have none.
        sketched: Gram matrices of the adapters' inputs are sent as sketches of the adapters' ranks, where no budget says
            otherwise.
    """

    name: str
    statistic: Statistic = Statistic.none
    ridge: Ridge | None = None
    shrink: float = 1.0
    fit: Target | None = None
    share: float = 1.0
    head: Ridge | Evidence | None = None
    probe: int = 0
    reach: float = 0.0
    step: Step = field(default_factory=Replace)
    adapters: Adapters | None = None
    sketched: bool = False
    pays: float = 0.0
    then: "Recipe | None" = None

    @property
    def fits(self) -> bool:
        """Whether stages follow that fit layers."""
        return self.head is not None or self.fit is not None

    @property
    def regularises(self) -> bool:
        """Whether anything is solved for."""
        return self.ridge is not None or self.head is not None

    @property
    def shrinks(self) -> bool:
        """Whether weights are weighed with Gram matrices that have an off-diagonal."""
        return self.statistic is Statistic.gram and not self.sketched

    def regularised(self, strength: float) -> "Recipe":
        """The same with another strength: the head's where nothing else is solved for."""
        if self.ridge is not None:
            return replace(self, ridge=replace(self.ridge, strength=strength))
        if self.head is not None:
            return replace(self, head=Ridge(strength, "anchor"))
        return self

    def frozen(self, number: int) -> Literal["", "lora_A", "lora_B"]:
        """The factor of adapters that clients do not train in a round, counted from 1; empty where they train all.

        A is frozen first: B begins at zero, and while it is, A has no gradient.
        """
        if self.adapters is not Adapters.alternating:
            return ""
        return "lora_A" if number % 2 else "lora_B"

    def check_align(self, align: Literal["client", "server", "off"]) -> None:
        """Check that the statistics can be collected where they are needed.

        Raises:
            ValueError: the server would have to turn a Fisher diagonal, or what only an aligned client has; or
                nobody would turn factors that are to be turned.
        """
        if self.adapters is Adapters.rotated and align == "off":
            raise ValueError(
                f"align = 'off': recipe {self.name!r} turns factors to the anchor's; set align = 'client' or 'server', "
                "or choose the recipe lora-factors"
            )
        if self.statistic is Statistic.fisher and align == "server":
            raise ValueError(
                "align = 'server': a Fisher diagonal cannot follow a rotation and must be collected on "
                "the aligned model; set align = 'client'"
            )
        if self.statistic is Statistic.kronecker and align == "server":
            raise ValueError(
                "align = 'server': Kronecker factors are collected on the aligned model; set align = 'client'"
            )
        if self.fits and align == "server":
            raise ValueError(
                f"align = 'server': recipe {self.name!r} fits layers to what a client's aligned model computes, "
                "which the client must have; set align = 'client', or 'off' where starts are shared"
            )


_FEDAVGM = Recipe("fedavgm", step=Momentum(0.7))
_AUTO_HEAD = Recipe("auto-head", head=Evidence(), probe=5, reach=2.0, pays=0.1, then=_FEDAVGM)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fedavg"),
        _FEDAVGM,
        Recipe("fisher", Statistic.fisher, Ridge(1e-3)),
        Recipe("kfac", Statistic.kronecker, Ridge(1e-3)),
        Recipe("regmean", Statistic.gram, Ridge(1e-3)),
        Recipe("regmean++", ridge=Ridge(1e-2), fit=Target.weights, step=Average()),
        Recipe("features", ridge=Ridge(3e-3), fit=Target.features, step=Average()),
        Recipe("head", head=Evidence()),
        replace(_AUTO_HEAD, name="auto", ridge=Ridge(1e-1), fit=Target.features, share=0.5),
        _AUTO_HEAD,
        Recipe(
            "features-head",
            ridge=Ridge(1e-1),
            fit=Target.features,
            share=0.5,
            head=Evidence(),
        ),
        Recipe("lora", Statistic.gram, Ridge(1e-2), adapters=Adapters.products, sketched=True),
        Recipe("lora-products", adapters=Adapters.products),
        Recipe("lora-factors", adapters=Adapters.factors),
        Recipe("lora-rotated", adapters=Adapters.rotated),
        Recipe("lora-gram", Statistic.gram, Ridge(1e-2), adapters=Adapters.products),
        Recipe("lorm", Statistic.gram, Ridge(1e-3), adapters=Adapters.alternating),
    )
}
