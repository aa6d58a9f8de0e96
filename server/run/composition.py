"""The parts of a run that do not change: settings, recipe, symmetry and layers, and the stages that follow from them."""

import logging
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedbasin.proto.layer_graph import BatchNorm, Block
from fedbasin.proto.request import Request, Start
from fedbasin.server.exchange.stage_attempt import StageLimits
from fedbasin.server.run.averaging import reason_before
from fedbasin.server.run.distillation_set import DistillationSet, log_distillation
from fedbasin.server.run.model_arrays import array_names, state_of
from fedbasin.server.run.resumption.run_folder import open_spool
from fedbasin.server.run.settings import Settings, SettingsError
from fedbasin.server.run.symmetry_of_run import symmetry_of_run
from fedbasin.strategies.alignment.matchers import AUTO, Matcher
from fedbasin.strategies.analytic.deep_analytic import DeepAnalytic
from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.attention_products import products
from fedbasin.strategies.fusion.batchnorm import find_norms
from fedbasin.strategies.fusion.compression.budget import BudgetError
from fedbasin.strategies.fusion.compression.stage_budget import check_budget, fit_encodings, fuse_encodings
from fedbasin.strategies.fusion.distillation.distilled_accumulator import DistilledAccumulator, Lesson
from fedbasin.strategies.fusion.head_memory import HeadMemory
from fedbasin.strategies.fusion.layers import Layer, gram_layers, known_blocks
from fedbasin.strategies.fusion.lora.lora_factors import AdapterError, adapted_layers
from fedbasin.strategies.fusion.rules.robust.robust_accumulator import RobustAccumulator
from fedbasin.strategies.fusion.rules.rule_accumulator import RuleAccumulator
from fedbasin.strategies.fusion.spool import SpoolFiles
from fedbasin.strategies.fusion.weighting import Statistic
from fedbasin.strategies.recipes import BlockRefit, LayerRefit, Recipe
from fedbasin.strategies.round.bootstrap import Bootstrap
from fedbasin.strategies.round.fuse import Align, fusing_stage
from fedbasin.strategies.round.pairwise import merge_in_pairs
from fedbasin.strategies.round.round_stages import RoundStages
from fedbasin.strategies.round.stage import Accumulate, Stage
from fedbasin.strategies.symmetry.example_inputs import Example
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State, tied

_LOG = logging.getLogger("flwr.fedbasin")

ScoreFn = Callable[[State], float]

# Fits of a round after own starts, which share the budget of statistics.
_FITS_OF_OWN_STARTS = 3


@dataclass(frozen=True, eq=False)
class Composition:
    """The fixed parts of a run.

    Attributes:
        settings: the settings of the run.
        recipe: the recipe with this run's server optimizer and regulariser.
        align: the side that aligns.
        symmetry: the symmetry of the model; None where nothing is aligned by one.
        blocks: the layers that every client must send statistics of; None lets the first client decide.
        layers: the layers whose inputs clients may send statistics of.
        ties: by name, the first name of the same tensor.
        array_names: by the model's names, the names of arrays that are called otherwise.
        score_fn: scores a model, lower is better; for `bootstrap = "best"`.
        norms: the BatchNorm layers of the model.
        lesson: what each round's mean is trained on; None where nothing is distilled.
    """

    settings: Settings
    recipe: Recipe
    align: Align
    symmetry: Symmetry | None = None
    blocks: Collection[Block] | None = None
    layers: Sequence[Layer] = ()
    ties: Mapping[str, str] | None = None
    array_names: Mapping[str, str] | None = None
    score_fn: ScoreFn | None = None
    norms: tuple[BatchNorm, ...] = ()
    lesson: Lesson | None = None

    @property
    def limits(self) -> StageLimits:
        """The limits of every stage."""
        settings = self.settings
        return StageLimits(
            settings.round_timeout_seconds,
            settings.quorum,
            settings.attempts,
            settings.max_update_bytes,
            settings.grace_seconds,
            settings.probe_share,
            max([1, *(rule.least for rule in (self.recipe.robust, self.recipe.rule) if rule is not None)]),
            settings.late_rounds,
            self._bounds,
            settings.bounds,
        )

    @property
    def _bounds(self) -> bool:
        # A robust rule bounds every client by itself, and gives what its paper says only on all updates.
        if self.recipe.robust is not None and "bounds" not in self.settings.model_fields_set:
            return False
        return self.settings.bounds

    def sample(self, online: Sequence[int], number: int, fraction: float, minimum: int) -> list[int]:
        """Return the nodes that a round asks: the same ones for the same round, also after a resume.

        Args:
            online: the nodes that are online.
            number: number of the round.
            fraction: share of them that is asked.
            minimum: smallest number of nodes that is asked.
        """
        size = min(len(online), max(int(fraction * len(online)), minimum))
        return sorted(self.shuffled(online, number)[:size])

    def shuffled(self, online: Sequence[int], number: int) -> list[int]:
        """Return all nodes in the order in which a round would ask them."""
        draw = random.Random(f"{self.settings.seed}/{number}")  # noqa: S311 - not a secret
        return draw.sample(sorted(online), len(online))

    def round_stages(self, number: int, recipe: Recipe, memory: HeadMemory) -> RoundStages:
        """Return the stages that a round chooses from."""
        settings = self.settings
        apart = self._starts_apart(number)
        merges = apart and settings.merge != "star"
        bootstraps = apart and self.align != "off" and not merges
        bootstrap = self._bootstrap_stage if bootstraps else None
        merge = None
        if settings.merge != "star" and apart:
            merge = partial(
                merge_in_pairs,
                merge=settings.merge,
                request=self._request(number),
                symmetry=self.symmetry,
                products=settings.merge_heads == "products",
            )
        own_refit = self._own_refit(recipe) if bootstraps else None
        encode = partial(fit_encodings, self.layers, _budget_of_fit(settings, several=bootstraps and recipe.chooses))
        return RoundStages(
            fuse=partial(self.fuse_stage, number, recipe),
            bootstrap=bootstrap,
            bootstrap_one_by_one=settings.bootstrap == "first",
            merge=merge,
            norms=self.measured_norms(number),
            grouping=settings.fit,
            encode=encode,
            accumulate=self._accumulate(number, recipe) or Accumulator.zero,
            own_refit=own_refit,
            # A robust rule bounds the clients of a round, and knows nothing of those before.
            memory=memory if recipe.robust is None else None,
            number=number,
        )

    def fuse_stage(self, number: int, recipe: Recipe, anchor: State) -> Stage:
        """Return the stage of a round in which clients train and are fused."""
        settings = self.settings
        merges = self._starts_apart(number) and settings.merge != "star"
        request = replace(
            self._request(number),
            # Fits, links, and the path that goes with an evaluation build on the client's models.
            keep=recipe.refit is not None
            or recipe.compares
            or recipe.step is not None
            or merges
            or settings.fused_points > 0
            or bool(self.measured_norms(number)),
            layer_graph=recipe.refit is not None,
            optional=recipe.chooses,
            encodings=fuse_encodings(recipe, self.layers, settings.statistics_budget_bytes),
            frozen_factor=recipe.frozen_factor(number),
        )
        dtype = torch.float64 if settings.sum == "reproducible" else torch.float32
        # Pairs are aligned to each other, later.
        align: Align = "off" if merges else self.align
        accumulate = self._accumulate(number, recipe)
        # A recipe that compares models lets clients judge a distilled one, but not in rounds in which it compares nothing.
        if self.lesson is not None and recipe.chooses == self.recipe.chooses:
            accumulate = partial(self._distilled_sum, self.lesson, dtype)
        return fusing_stage(anchor, recipe, request, self.symmetry, align, self.blocks, dtype, accumulate)

    def _distilled_sum(self, lesson: Lesson, dtype: torch.dtype, anchor: State) -> DistilledAccumulator:
        return DistilledAccumulator(Accumulator.zero(anchor, dtype), lesson, self.files.open(), log_distillation)

    @cached_property
    def files(self) -> SpoolFiles:
        """The files of replies, in the folder of runs."""
        return SpoolFiles(partial(open_spool, Path(self.settings.resume or self.settings.folder)))

    def measured_norms(self, number: int) -> tuple[BatchNorm, ...]:
        """Return the BatchNorm layers that a round measures anew: where it mixes models that share no start."""
        return self.norms if self._starts_apart(number) else ()

    def needs(self, number: int, recipe: Recipe) -> Request:
        """Return what a round asks of its clients beside training, for which an app needs the mod and its data."""
        return Request(
            "",
            start=Start.own if self._starts_apart(number) else Start.shared,
            statistic=recipe.statistic.name,
            layer_graph=recipe.refit is not None,
            optional=recipe.chooses,
        )

    def untied(self, model: State) -> dict[str, Tensor]:
        """Return a model with every name of one tensor restored from its first name.

        A statistic speaks of a tensor under its first name; the others are the same tensor.
        """
        ties = self.ties or {}
        return {name: model[ties.get(name, name)] for name in model}

    def _accumulate(self, number: int, recipe: Recipe) -> Accumulate | None:
        """Return what makes the accumulator of a rule, with a file of its own; None for a recipe that sums."""
        robust, rule = recipe.robust, recipe.rule
        if robust is not None:
            return lambda anchor: RobustAccumulator(anchor, robust, self.files.open())
        if rule is not None:
            seed = f"{self.settings.seed} {number}"
            return lambda anchor: RuleAccumulator(anchor, rule, self.files.open(), seed)
        return None

    def _own_refit(self, recipe: Recipe) -> LayerRefit | None:
        """Return the fit of all layers after own starts; None where their sums are above the budget."""
        refit = recipe.refit_of_own_starts(self.settings.ridge)
        if refit is None:
            return None
        try:
            check_budget(replace(recipe, refit=refit), self.layers, _budget_of_fit(self.settings, several=True))
        except BudgetError as error:
            _LOG.info("recipe %s fits no layers but the last after own starts: %s", recipe.name, error)
            return None
        return refit

    def _bootstrap_stage(self, template: State) -> Stage:
        return Bootstrap(template, self.settings.bootstrap, self.symmetry, self.score_fn)

    def _request(self, number: int) -> Request:
        """Return what links and fusions have in common."""
        return Request(
            "",
            start=Start.own if self._starts_apart(number) else Start.shared,
            matcher=self._matcher(number),
            learned_steps=self.settings.learned_steps,
            learned_smoothing=self.settings.learned_smoothing,
            path_points=self.settings.barrier_points,
        )

    def _matcher(self, number: int) -> str:
        """Return the name of the matcher that a round's clients are sent."""
        if self.settings.matcher != AUTO:
            return self.settings.matcher
        # A recipe without fits takes clients without data, and the mean of perceptrons is better by weights.
        fits = self.recipe.refit is not None and self.align == "client" and self.settings.merge == "star"
        return AUTO if fits and self._starts_apart(number) else Matcher.weights.name

    def _starts_apart(self, number: int) -> bool:
        return number == 1 and self.settings.start == "own"


def compose(
    settings: Settings,
    model: nn.Module | None,
    example: Example | None,
    symmetry: Symmetry | None,
    arrays: ArrayRecord,
    score_fn: ScoreFn | None = None,
    distillation: DistillationSet | None = None,
) -> Composition:
    """Check and compose everything that can be refused before the first message.

    Args:
        settings: the settings of the run.
        model: the app's model; None where only its arrays are known.
        example: inputs of the model.
        symmetry: the symmetry of the model; None derives it from model and example.
        arrays: the initial arrays.
        score_fn: scores a model.
        distillation: inputs on which each round's mean is distilled from the clients' models.

    Raises:
        SettingsError: the configuration cannot be run.
        SymmetryError: the symmetry is another model's, or changes the function of the model.
    """
    names = array_names(model, arrays)
    if settings.bootstrap == "best" and settings.start == "own" and score_fn is None:
        raise SettingsError(
            "bootstrap = 'best' needs a score; pass score_fn=... to FedBasin, or choose another bootstrap"
        )
    state, recipe = state_of(arrays, names), settings.composed
    if recipe.chooses and (reason := reason_before(settings, model, state)):
        recipe = averaging(recipe, reason)
    if model is None and (recipe.statistic is not Statistic.none or recipe.refit) and recipe.lora is None:
        raise SettingsError(f"recipe = {recipe.name!r} needs the layers of the model; pass model=Net() to FedBasin")
    if isinstance(recipe.refit, BlockRefit) and not isinstance(model, DeepAnalytic):
        raise SettingsError(
            f"recipe = {recipe.name!r} fits the blocks of a fedbasin.DeepAnalytic, and the model is a "
            f"{type(model).__name__}; give DeepAnalytic(inputs, outputs, body=...) to FedBasin and to basin in its "
            "place, or choose the recipe head, which fits the last layer of any model"
        )
    align, symmetry = symmetry_of_run(settings, model, example, symmetry, state)
    if settings.merge_heads == "products" and not any(products(symmetry) if symmetry else ()):
        raise SettingsError(
            "merge-heads = 'products': the symmetry of the model has no heads with a rotation of their own; set "
            "merge-heads = 'weights'"
        )
    layers = _layers(recipe, model, state)
    _check_folds(align, recipe, symmetry)
    several = settings.start == "own" and settings.merge == "star" and align != "off" and recipe.chooses
    try:
        check_budget(recipe, layers, _budget_of_fit(settings, several=several))
    except BudgetError as error:
        shared = f"; this is for each of {_FITS_OF_OWN_STARTS} fits of the round after start = 'own'"
        raise SettingsError(f"{error}{shared if several else ''}") from error
    return Composition(
        settings,
        recipe,
        align,
        symmetry,
        None if model is None else known_blocks(model, recipe.statistic),
        layers,
        None if model is None else tied(model.state_dict()),
        names,
        score_fn,
        () if model is None or recipe.lora is not None else find_norms(model),
        None if distillation is None else distillation.lesson(settings, recipe, state),
    )


def _budget_of_fit(settings: Settings, *, several: bool) -> int:
    """Return the bytes of one fit's sums; 0 for no bound.

    Args:
        settings: the settings of the run.
        several: whether a round fits the anchor's head, all layers, and the head after further steps.
    """
    budget = settings.statistics_budget_bytes
    return max(1, budget // _FITS_OF_OWN_STARTS) if budget and several else budget


def averaging(recipe: Recipe, reason: str, *, steps: bool = False) -> Recipe:
    """Return a recipe that compares models without the comparison, and say why.

    Args:
        recipe: the recipe.
        reason: what keeps clients from comparing.
        steps: whether they can still judge how far a round goes.
    """
    steps = steps and recipe.step is not None
    what = "only averages, as FedAvg" if recipe.chooses else "compares no models"
    further = ", and takes longer steps where clients can judge them" if steps else ""
    _LOG.info("recipe %s %s%s: %s", recipe.name, what, further, reason)
    return recipe.averaging if steps else recipe.uncompared


def _layers(recipe: Recipe, model: nn.Module | None, state: State) -> list[Layer]:
    """Return the layers that clients may send statistics of."""
    if recipe.lora is not None:
        try:
            return adapted_layers(state)
        except AdapterError as error:
            raise SettingsError(f"recipe = {recipe.name!r}: {error}") from error
    return [] if model is None else gram_layers(model)


def _check_folds(align: Align, recipe: Recipe, symmetry: Symmetry | None) -> None:
    """Report that folding makes the global model another parametrisation, or that it cannot be done."""
    if symmetry is None or not symmetry.folds:
        return
    if align == "server" and recipe.statistic is not Statistic.none:
        raise SettingsError(
            f"align = 'server' with recipe = {recipe.name!r}: the symmetry folds norms into the layers that read "
            "them, whose statistics cannot follow; set align = 'client'"
        )
    _LOG.info("the symmetry folds %d norms: in the global model their weights will be 1", len(symmetry.folds))
