"""The catalogue of recipes: named values that say what a round asks of clients and how their updates become one model.

A recipe has up to four parts: how updates are fused (`fusion`), which layers are then refitted in closed form
(`refit`), how the global model follows (`server_optimizer`), and by which robust rule clients are combined where some
may be hostile (`robust`). Each part is a frozen value that holds its own
settings, so that a setting cannot be given where nothing would read it.

Closed forms that are trained on decay: on skewed labels their loss rises again after a few rounds. Clients therefore
train on from the mean, as FedAvg does, and the closed form is the model that is served. Only after round 1, whose mean
is far behind, they train on from a closed form that was not fitted to labels.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar, Literal, TypeAlias

from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import Evidence
from fedbasin.strategies.fusion.rules.federated_rule import FederatedRule
from fedbasin.strategies.fusion.rules.robust.robust_rules import RobustRule
from fedbasin.strategies.fusion.weighting import (
    FisherWeighting,
    GramWeighting,
    KroneckerWeighting,
    ModelWeighting,
    SketchedGramWeighting,
    Statistic,
    Weighting,
    override_weighting,
)
from fedbasin.strategies.server_optimizers import Momentum, Replace, ServerOptimizer


class Target(Enum):
    """A target that layers are fitted to, on the inputs that the layers fused so far compute."""

    features = "what the client's own model computes there"
    weights = "what the client's own weights make of the same inputs (RegMean++)"
    labels = "the classes: a closed-form head of discriminants"
    values = "the targets themselves, numbers or labels of their own: a closed-form head by least squares"


FrozenFactor: TypeAlias = Literal["", "lora_A", "lora_B"]

# A is frozen first: B begins at zero, and A has no gradient while B is zero.
ALTERNATING: tuple[FrozenFactor, ...] = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LoraFactors:
    """Fusion of low-rank adapters factor by factor.

    Attributes:
        rotate: first rotate a client's factors to the anchor's.
        frozen: the factor that clients do not train, by rounds in turn; empty where they train both.
    """

    rotate: bool = False
    frozen: tuple[FrozenFactor, ...] = ("",)
    weighting: ClassVar[None] = None


@dataclass(frozen=True)
class LoraProducts:
    """Fusion of low-rank adapters by the products of their factors, which are then split again.

    Attributes:
        weighting: weights the mean of the products; None takes it by examples.
    """

    weighting: GramWeighting | SketchedGramWeighting | None = None


@dataclass(frozen=True)
class LoraAlternating:
    """Fusion of one factor of low-rank adapters per round, weighted by its inputs; the other factor is frozen."""

    weighting: GramWeighting
    frozen: ClassVar[tuple[FrozenFactor, ...]] = ALTERNATING


LoraFusion: TypeAlias = LoraFactors | LoraProducts | LoraAlternating


@dataclass(frozen=True)
class LossProbe:
    """A line search on the clients' losses between the fused and the refitted model.

    The best point is served. The next round trains on it where the clients' own first steps from there lower its loss,
    and on the fused model elsewhere.

    Attributes:
        points: number of points that clients evaluate on each line.
        extrapolate: length of a second line, from the global model through the best point of the first, in multiples
            of the distance to that point; 0 leaves it out.
    """

    points: int
    extrapolate: float = 0.0


@dataclass(frozen=True)
class StepSearch:
    """A search for a longer step than the one to the mean of the clients' models.

    Attributes:
        points: number of points that clients evaluate on each of two lines: along the last round's move, and beyond.
        length: longest step, in multiples of the whole one, which has to be one of the points.
    """

    points: int
    length: float


@dataclass(frozen=True)
class LayerRefit:
    """A closed-form fit of all layers after fusing, from the input to the output.

    Attributes:
        target: target of every layer, the head apart if `head` is given.
        ridge: strength of the regulariser, relative to the mean diagonal of the clients' sum.
        fraction: fraction of the solution in the refitted layers; the rest stays as it was fused.
        head: regulariser of a last layer that is fitted to labels; None fits it as all other layers.
        probe: line search between the fused and the refitted model; None takes the refitted one.
    """

    target: Literal[Target.features, Target.weights]
    ridge: float = 1e-3
    fraction: float = 1.0
    head: Ridge | Evidence | None = None
    probe: LossProbe | None = None


@dataclass(frozen=True)
class HeadRefit:
    """A closed-form fit of the last layer alone to labels.

    Attributes:
        head: regulariser of the fit.
        probe: line search between the fused and the refitted model; None takes the refitted one.
    """

    head: Ridge | Evidence
    probe: LossProbe | None = None


@dataclass(frozen=True)
class BlockRefit:
    """A closed-form fit of the blocks of a `DeepAnalytic` one after the other, and of its last layer, to the targets.

    Attributes:
        head: regulariser of the last layer, in every stage.
    """

    head: Ridge | Evidence
    probe: ClassVar[None] = None


ClosedForm: TypeAlias = LayerRefit | HeadRefit | BlockRefit


@dataclass(frozen=True)
class Recipe:
    """A recipe that turns a round's updates into the next global model.

    Attributes:
        name: name in the configuration.
        fusion: weighting of the clients' models, or fusion of their low-rank adapters; None takes the mean by examples.
        refit: closed-form fit that follows in further stages of the round.
        server_optimizer: rule by which the global model follows the round's model.
        robust: rule that takes the place of every sum over clients; None sums.
        rule: merging rule that takes the place of the mean by examples; None takes the mean.
        points: number of points between the mean by examples and the recipe's own model that clients evaluate; 0 takes
            the recipe's own. Recipes with a search of their own, `probe`, have none.
        step: search for a longer step than the one to the mean; None takes the mean.
    """

    name: str
    fusion: ModelWeighting | LoraFusion | None = None
    refit: ClosedForm | None = None
    server_optimizer: ServerOptimizer = field(default_factory=Replace)
    robust: RobustRule | None = None
    rule: FederatedRule | None = None
    points: int = 0
    step: StepSearch | None = None

    @property
    def lora(self) -> LoraFusion | None:
        """The fusion of low-rank adapters; None for recipes of whole models."""
        return self.fusion if isinstance(self.fusion, LoraFusion) else None

    @property
    def weighting(self) -> Weighting | None:
        """The statistic that weights the mean, with its regulariser; None for the number of examples."""
        return self.fusion.weighting if isinstance(self.fusion, LoraFusion) else self.fusion

    @property
    def statistic(self) -> Statistic:
        """The statistic that clients collect, on the aligned model."""
        return Statistic.none if self.weighting is None else self.weighting.statistic

    @property
    def shrink(self) -> float:
        """The factor on the off-diagonal of Gram matrices."""
        return self.weighting.shrink if isinstance(self.weighting, GramWeighting) else 1.0

    @property
    def regularises(self) -> bool:
        """True if the recipe solves for anything, so that a regulariser has a meaning."""
        return self.weighting is not None or self.refit is not None

    @property
    def shrinks(self) -> bool:
        """True if weights are averaged with Gram matrices that have an off-diagonal to shrink."""
        return isinstance(self.weighting, GramWeighting)

    @property
    def probe(self) -> LossProbe | None:
        """The search that compares the fused and the refitted model; None for recipes that take one of them."""
        return self.refit.probe if self.refit else None

    @property
    def chooses(self) -> bool:
        """True if clients compare the mean with models that are fitted, so that the mean may be all that is left."""
        return self.probe is not None

    @property
    def serves_apart(self) -> bool:
        """True if the recipe's model is served, where it is better, and clients train on from the mean by examples."""
        return self.points > 0 and self.lora is None

    @property
    def compares(self) -> bool:
        """True if clients evaluate several models of a round, of which one is taken."""
        return self.chooses or self.points > 0

    @property
    def fits_or_compares(self) -> bool:
        """True if a round has stages after the mean in which clients fit layers or compare models."""
        return self.refit is not None or self.compares

    @property
    def averaging(self) -> "Recipe":
        """The recipe without closed forms, for rounds in which they do not pay: the mean, or one of adapters' products."""
        fusion = None if self.serves_apart else self.fusion
        return replace(self, fusion=fusion, refit=None, points=0)

    @property
    def uncompared(self) -> "Recipe":
        """The recipe where clients can compare nothing: its own model, or the mean where it chooses between models."""
        return replace(self.averaging, step=None) if self.chooses else replace(self, points=0)

    def override(
        self,
        *,
        server_optimizer: ServerOptimizer | None = None,
        ridge: float = 0.0,
        shrink: float = 1.0,
        robust: RobustRule | None = None,
        rule: FederatedRule | None = None,
    ) -> "Recipe":
        """Return the recipe with a run's settings.

        Args:
            server_optimizer: replaces the recipe's; None keeps it.
            ridge: strength of the regulariser; 0 keeps the recipe's. A head keeps its own where the recipe solves for
                other layers too.
            shrink: factor on the off-diagonal of Gram matrices; recipes without Gram matrices ignore it.
            robust: replaces the recipe's robust rule; None keeps it.
            rule: replaces the recipe's merging rule; None keeps it.
        """
        fusion = self.fusion
        if isinstance(fusion, LoraAlternating):
            weighting = override_weighting(fusion.weighting, ridge, shrink)
            fusion = LoraAlternating(weighting)
        elif isinstance(fusion, LoraProducts) and fusion.weighting is not None:
            fusion = replace(fusion, weighting=override_weighting(fusion.weighting, ridge, shrink))
        elif fusion is not None and not isinstance(fusion, LoraFusion):
            fusion = override_weighting(fusion, ridge, shrink)
        refit = self.refit
        if ridge and isinstance(refit, LayerRefit):
            refit = replace(refit, ridge=ridge)
        elif ridge and refit is not None and self.weighting is None:
            refit = replace(refit, head=Ridge(ridge, "anchor"))
        optimizer = server_optimizer or self.server_optimizer
        robust = robust or self.robust
        # Under attack a robust mean of models is farther from a good one than the solution of robust statistics.
        points = 0 if robust is not None and fusion is not None else self.points
        rule = rule or self.rule
        # A server optimizer has a step of its own, and robust rules and merging rules bring no mean to go beyond.
        step = self.step if optimizer == Replace() and robust is None and rule is None else None
        return Recipe(self.name, fusion, refit, optimizer, robust, rule, points, step)

    def refit_of_own_starts(self, ridge: float = 0.0) -> LayerRefit | None:
        """Return the fit of all layers that a round tries whose clients share no start; None for the recipe's own fit.

        The mean of such models is a poor one even where they are aligned, so that nothing of it is kept.

        Args:
            ridge: strength of the regulariser that a run has set; 0 for none.
        """
        refit = self.refit
        if refit is None or refit.probe is None:
            return None
        strength = ridge if ridge and isinstance(refit, LayerRefit) else _RIDGE_OF_OWN_STARTS
        return LayerRefit(Target.features, strength, head=refit.head, probe=refit.probe)

    def frozen_factor(self, number: int) -> FrozenFactor:
        """Return the LoRA factor that clients do not train in a round; empty where they train both.

        Args:
            number: number of the round, from 1.
        """
        frozen = self.fusion.frozen if isinstance(self.fusion, LoraFactors | LoraAlternating) else ("",)
        return frozen[(number - 1) % len(frozen)]

    def check_robust(self) -> None:
        """Check that clients can be combined by the recipe's robust rule.

        Raises:
            ValueError: the recipe sums products of adapters' factors, which are compressed as they arrive.
        """
        if self.robust is not None and isinstance(self.fusion, LoraProducts):
            raise ValueError(
                f"robust = {self.robust.name!r} with recipe = {self.name!r}: products of adapters' factors are "
                "compressed as they arrive, and clients cannot be told apart; choose the recipe lora-rotated, "
                "lora-factors, ffa-lora, rolora or lorm"
            )

    def check_rule(self) -> None:
        """Check that models can be merged by the recipe's rule.

        Raises:
            ValueError: the recipe has another fusion than the mean, or more stages.
        """
        fits = self.refit is not None and not self.chooses
        if self.rule is not None and (self.fusion is not None or fits or self.robust is not None):
            raise ValueError(
                f"rule = {self.rule.name!r} with recipe = {self.name!r}: a merging rule takes the place of the mean of "
                "whole models; choose the recipe fedavg, fedavgm or auto, and no robust rule"
            )

    def check_align(self, align: Literal["client", "server", "off"]) -> None:
        """Check that the statistics can be collected where they are needed.

        Raises:
            ValueError: the server would have to rotate a Fisher diagonal, or to compute what needs a client's aligned
                model; or nobody would rotate factors that the recipe wants rotated.
        """
        if self.fusion == LoraFactors(rotate=True) and align == "off":
            raise ValueError(
                f"align = 'off': recipe {self.name!r} rotates factors to the anchor's; set align = 'client' or "
                "'server', or choose the recipe lora-factors"
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
        if self.refit is not None and not self.chooses and align == "server":
            raise ValueError(
                f"align = 'server': recipe {self.name!r} fits layers to what a client's aligned model computes, "
                "which the client must have; set align = 'client', or 'off' where starts are shared"
            )


# Between .003 and .01 nothing differs by more than chance; .1 keeps too much of a mean that is no model.
_RIDGE_OF_OWN_STARTS = 1e-2
_POINTS = 5
_PROBE = LossProbe(_POINTS, extrapolate=2.0)
_STEP = StepSearch(_POINTS, length=2.0)
_HALF_FEATURES = LayerRefit(Target.features, ridge=1e-1, fraction=0.5, head=Evidence())

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("auto", refit=HeadRefit(Evidence(), _PROBE), step=_STEP),
        Recipe("auto-features", refit=replace(_HALF_FEATURES, probe=_PROBE), step=_STEP),
        Recipe("fedavg"),
        Recipe("fedavgm", server_optimizer=Momentum(0.7)),
        Recipe("fisher", FisherWeighting(Ridge(1e-3))),
        Recipe("kfac", KroneckerWeighting(Ridge(1e-3)), points=_POINTS),
        Recipe("regmean", GramWeighting(Ridge(1e-3)), points=_POINTS),
        Recipe("regmean++", refit=LayerRefit(Target.weights, ridge=1e-2), points=_POINTS),
        Recipe("features", refit=LayerRefit(Target.features, ridge=3e-3), points=_POINTS),
        Recipe("head", refit=HeadRefit(Evidence()), points=_POINTS),
        Recipe("features-head", refit=_HALF_FEATURES, points=_POINTS),
        Recipe("deep-analytic", refit=BlockRefit(Evidence())),
        # Sketches twice as wide as the adapters cost as much again as the factors themselves.
        Recipe("lora", LoraProducts(SketchedGramWeighting(Ridge(1e-2))), points=_POINTS),
        Recipe("lora-products", LoraProducts()),
        Recipe("lora-factors", LoraFactors()),
        Recipe("lora-rotated", LoraFactors(rotate=True)),
        # Sun et al. 2024, arXiv 2403.12313, and Chen et al. 2025, arXiv 2502.01755.
        Recipe("ffa-lora", LoraFactors(frozen=("lora_A",))),
        Recipe("rolora", LoraFactors(frozen=ALTERNATING)),
        Recipe("lora-gram", LoraProducts(GramWeighting(Ridge(1e-2))), points=_POINTS),
        Recipe("lorm", LoraAlternating(GramWeighting(Ridge(1e-3)))),
    )
}
