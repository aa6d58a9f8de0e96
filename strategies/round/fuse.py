"""Training, alignment and fusion: FedAvg, Fisher and RegMean are this stage with different statistics."""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block, LayerGraph
from fedbasin.proto.request import Request
from fedbasin.strategies.alignment.identity_bound import identity_bounds
from fedbasin.strategies.alignment.matchers import BY_WEIGHTS, Matcher
from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.distillation.distilled_accumulator import DistilledAccumulator
from fedbasin.strategies.fusion.lora.adapter_scales import scales_of, to_scales
from fedbasin.strategies.fusion.lora.lora_factors import blocks_of, find_adapters, sketch_encodings
from fedbasin.strategies.fusion.lora.product_accumulator import ProductAccumulator
from fedbasin.strategies.fusion.rules.rule_accumulator import RuleAccumulator
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.fusion.weighting import SketchedGramWeighting, Statistic
from fedbasin.strategies.judging.checks import (
    check_alike,
    check_blocks,
    check_frozen,
    check_layer_graph,
    check_model,
    check_update,
)
from fedbasin.strategies.judging.matching import refusing_what_cannot_be_matched
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.recipes import LoraFactors, LoraProducts, Recipe
from fedbasin.strategies.round.stage import Accumulate, Checked, Stage
from fedbasin.strategies.symmetry.lora_symmetry import adapters
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State

Align = Literal["client", "server", "off"]


class Fuse:
    """A stage in which clients train and send their models and statistics, which are summed."""

    stage = "fuse"

    def __init__(
        self,
        anchor: State,
        recipe: Recipe,
        request: Request,
        blocks: Collection[Block] | None = None,
        dtype: torch.dtype = torch.float64,
        accumulate: Accumulate | None = None,
    ) -> None:
        self.request = replace(request, stage=self.stage)
        self._anchor = anchor
        self._recipe = recipe
        self._blocks = () if recipe.statistic is Statistic.none else blocks
        products = isinstance(recipe.fusion, LoraProducts)
        summing = partial((ProductAccumulator if products else Accumulator).zero, dtype=dtype)
        self._accumulator = (accumulate or summing)(anchor)
        self._layer_graphs: Counter[LayerGraph | None] = Counter()

    def check(self, update: Update) -> Checked:
        if self._blocks is None and not update.precisions:
            statistic = self._recipe.statistic
            raise Refusal(Outcome.missing_statistic, f"the recipe needs {statistic.value}")
        distances = check_update(update, self._anchor, self._blocks)
        if scales_of(update.parameters):
            update = _rescale(update, self._anchor)
            distances = check_model(update.parameters, self._anchor)
        check_frozen(update.parameters, self._anchor, self.request.frozen_factor)
        if self.request.layer_graph and not (self.request.optional and update.layer_graph is None):
            check_layer_graph(update.layer_graph, self._anchor)
        return Checked(update, distances)

    def add(self, node: int, update: Update) -> None:  # noqa: ARG002 - the sum forgets who
        if self._blocks is None and self._accumulator.clients:
            check_blocks(update.precisions, self._accumulator.blocks, self._anchor)
        check_alike(update, self._accumulator.blocks)
        self._layer_graphs[update.layer_graph] += 1
        self._accumulator.add(update)

    @property
    def layer_graph(self) -> LayerGraph | None:
        """The layer graph that most clients have; None where none was requested, or a client could not report its own."""
        # What is fitted to some clients alone can be worse for the others than the mean.
        if None in self._layer_graphs:
            return None
        return max(self._layer_graphs, key=self._layer_graphs.__getitem__, default=None)

    @property
    def average(self) -> dict[str, Tensor] | None:
        if not self._recipe.compares:
            return None
        if self._recipe.points and self._recipe.fusion and not isinstance(self._accumulator, RuleAccumulator):
            return self._accumulator.average(self._anchor)
        # The mean of a recipe that fits layers is this stage's model.
        return self._accumulator.undistilled if isinstance(self._accumulator, DistilledAccumulator) else None

    @property
    def notes(self) -> tuple[str, ...]:
        return self._accumulator.notes

    def finish(self) -> dict[str, Tensor]:
        weighting = self._recipe.weighting
        return self._accumulator.finalize(self._anchor, weighting.ridge if weighting else None)


def _rescale(update: Update, anchor: State) -> Update:
    """Return the update with adapters in the anchor's scales: clients without the mod reply in their own.

    Raises:
        Refusal: a scale is not positive.
    """
    for name, scale in scales_of(update.parameters).items():
        if not scale > 0:
            raise Refusal(Outcome.not_positive, name)
    return replace(update, parameters=to_scales(update.parameters, scales_of(anchor)))


class AlignedFuse:
    """A fusing stage in which the server aligns, one reply at a time, for clients that cannot align themselves."""

    def __init__(self, fuse: Fuse, anchor: State, symmetry: Symmetry) -> None:
        self.request = fuse.request
        self._fuse = fuse
        self._anchor = anchor
        self._symmetry = symmetry
        self._bounds = identity_bounds(symmetry, anchor)
        self._match = BY_WEIGHTS[Matcher[fuse.request.matcher]]

    def check(self, update: Update) -> Checked:
        # Checked before it is aligned: an assignment over NaN has no answer.
        update = self._fuse.check(update).update
        with refusing_what_cannot_be_matched():
            alignment = self._match(self._symmetry, self._anchor, update.parameters, self._bounds)
        folded = replace(update, parameters=self._symmetry.fold(update.parameters))
        aligned = folded.apply(alignment.transform)
        return Checked(aligned, check_model(aligned.parameters, self._anchor), alignment.report)

    def add(self, node: int, update: Update) -> None:
        self._fuse.add(node, update)

    def finish(self) -> dict[str, Tensor]:
        return self._fuse.finish()

    @property
    def average(self) -> dict[str, Tensor] | None:
        return self._fuse.average

    @property
    def notes(self) -> tuple[str, ...]:
        return self._fuse.notes

    @property
    def layer_graph(self) -> LayerGraph | None:
        return self._fuse.layer_graph


def fusing_stage(
    anchor: State,
    recipe: Recipe,
    request: Request,
    symmetry: Symmetry | None,
    align: Align,
    blocks: Collection[Block] | None = None,
    dtype: torch.dtype = torch.float64,
    accumulate: Accumulate | None = None,
) -> Stage:
    """Return the fusing stage of a round, with alignment where it is wanted.

    Args:
        anchor: the global model of this round.
        recipe: what clients send and how it is fused.
        request: what is asked apart from statistics and alignment.
        symmetry: the symmetry of the model; None leaves clients as they are.
        align: the side that aligns.
        blocks: the layers that every client must send statistics of; None lets the first client decide.
        dtype: number format of the sums.
        accumulate: makes the accumulator of a robust rule; None sums.
    """
    if recipe.lora is not None:
        request, symmetry, blocks = _adapted(anchor, recipe, request, symmetry)
    request = replace(request, statistic=recipe.statistic.name, shrink=recipe.shrink)
    if align == "off" or symmetry is None:
        return Fuse(anchor, recipe, request, blocks, dtype, accumulate)
    if align == "server":
        return AlignedFuse(Fuse(anchor, recipe, request, blocks, dtype, accumulate), anchor, symmetry)
    bounds = identity_bounds(symmetry, anchor)
    request = replace(request, symmetry=str(symmetry), identity_bounds=bounds)
    return Fuse(anchor, recipe, request, blocks, dtype, accumulate)


def _adapted(
    anchor: State, recipe: Recipe, request: Request, symmetry: Symmetry | None
) -> tuple[Request, Symmetry | None, tuple[Block, ...]]:
    """Return the request for adapters, their symmetry, and the layers of which they need statistics."""
    factors = find_adapters(anchor)
    blocks: tuple[Block, ...] = ()
    if recipe.statistic is Statistic.gram:
        blocks = tuple(blocks_of(factors, "up" if request.frozen_factor == "lora_A" else "down", anchor))
    if recipe.fusion == LoraFactors(rotate=True):
        symmetry = adapters(anchor)
    is_sketched = isinstance(recipe.weighting, SketchedGramWeighting)
    encodings = request.encodings or (sketch_encodings(anchor) if is_sketched else {})
    return replace(request, blocks=blocks, encodings=encodings), symmetry, blocks
