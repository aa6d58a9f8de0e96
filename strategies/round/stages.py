"""A round is a short list of stages: each asks clients one thing, folds what comes back, and ends in a value.

    bootstrap   give me your model, so that one client's becomes the anchor
    fuse        train, align to this anchor, say what you know; the sum becomes the global model
    evaluate    say how the new model does on your data

A stage knows what to ask and how to fold. How the question travels, who is asked, how long to wait and what
to do with a refusal is written once, for all stages, by whoever runs them.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import BatchNorm, Block, LayerGraph
from fedbasin.strategies.alignment.identity_bound import Radii, identity_radii
from fedbasin.strategies.alignment.matchers import Matcher
from fedbasin.strategies.alignment.pairwise_merging import Link
from fedbasin.strategies.alignment.sinkhorn import match_sinkhorn
from fedbasin.strategies.alignment.weight_matching import AlignmentReport, match_weights
from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.lora.lora_factors import blocks_of, find_adapters, sketched
from fedbasin.strategies.fusion.lora.product_accumulator import ProductAccumulator
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.recipes import Adapters, Recipe, Statistic, Target
from fedbasin.strategies.round.checks import (
    check_alike,
    check_examples,
    check_frozen,
    check_layer_graph,
    check_update,
)
from fedbasin.strategies.round.outcomes import Outcome, Refusal
from fedbasin.strategies.symmetry.models.lora_symmetry import adapters
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State, beyond, floating, interpolate


class Start(Enum):
    """Where a client's training begins."""

    shared = "from the anchor"
    own = "from the client's own initial weights; the anchor is only aligned to"


@dataclass(frozen=True)
class Along:
    """A path among the models of one round: global as the round began, fused, and fitted.

    Attributes:
        share: of the fitted model in a point of the line from fused to fitted.
        reach: 0 for that line itself; otherwise the line from the global model through this point, to as many
            times its distance.
    """

    share: float = 1.0
    reach: float = 0.0

    def ends(self, model: State, fused: State, fitted: State) -> tuple[State, State]:
        """Where the path begins and ends.

        Args:
            model: the global model that the round began with.
            fused: what its clients' models were fused to.
            fitted: the same with layers fitted.
        """
        if not self.reach:
            return fused, fitted
        through = interpolate(fused, fitted, self.share)
        return beyond(model, through, 0.0), beyond(model, through, self.reach)


@dataclass(frozen=True)
class Fitting:
    """Layers to fit, in place of training.

    Attributes:
        blocks: which; none where the model so far is only to be evaluated.
        target: what they are fitted to; None where there are none.
        sequence: of the piece of the fused model that the request carries; 0 is all of it.
        along: the path to evaluate, where that is asked for.
        norms: BatchNorms whose statistics are measured on the model so far.
    """

    blocks: tuple[Block, ...]
    target: Target | None
    sequence: int
    along: Along | None = None
    norms: tuple[BatchNorm, ...] = ()


@dataclass(frozen=True, eq=False)
class Ask:
    """What a stage wants from every client.

    Attributes:
        start: where training begins.
        symmetry: the client aligns its model to the anchor by this symmetry; None leaves it.
        radii: the anchor's identity radii, so that a client near the anchor has nothing to search.
        statistic: what to collect on the aligned model.
        shrink: factor on the off-diagonal of Gram matrices.
        path_points: points of the path from the model that is sent to the client's at which it evaluates the loss.
        fit: layers to fit; nothing is trained then.
        layer_graph: say in which order the model uses its layers.
        keep: another stage of the round follows, for which the client keeps its model, as trained and as sent.
        encodings: how Gram matrices and moments are sent; those of blocks that are not named, exactly.
        matcher: how the client aligns its model.
        link: what is merged in pairs.
        blocks: those that statistics are collected of; none for all.
        frozen: the factor of low-rank adapters that clients do not train.
    """

    start: Start = Start.shared
    symmetry: Symmetry | None = None
    radii: Radii = field(default_factory=dict)
    statistic: Statistic = Statistic.none
    shrink: float = 1.0
    path_points: int = 0
    fit: Fitting | None = None
    layer_graph: bool = False
    keep: bool = False
    encodings: Mapping[Block, Encoding] = field(default_factory=dict)
    matcher: Matcher = Matcher.weights
    link: Link | None = None
    blocks: tuple[Block, ...] = ()
    frozen: Literal["", "lora_A", "lora_B"] = ""


Kind = Literal["train", "evaluate"]


class Stage(Protocol):
    """One question to some clients. `accept` checks first and folds then: a refusal leaves no trace.

    Attributes:
        name: as in messages and reports.
        kind: which of the app's functions answers.
        ask: what is wanted.
        layer_graph: of the model's layers, as the first client says, where it was asked for.
    """

    name: str
    kind: Kind
    ask: Ask

    @property
    def layer_graph(self) -> LayerGraph | None:
        """Known once a client has been folded."""
        ...

    def accept(self, node: int, update: Update) -> AlignmentReport | None:
        """Fold one client; the update is not kept.

        Returns:
            how the server's own alignment went, where the stage aligns.

        Raises:
            Refusal: the update does not belong into the sum.
        """
        ...

    def finish(self) -> dict[str, Tensor]:
        """The value that the stage ends in: a model."""
        ...


class Fuse:
    """Train, align and fuse: FedAvg, Fisher and RegMean are this stage with another statistic."""

    name = "fuse"
    kind: Kind = "train"

    def __init__(
        self,
        anchor: State,
        recipe: Recipe,
        ask: Ask,
        blocks: Collection[Block] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.ask = ask
        self._anchor = anchor
        self._recipe = recipe
        self._blocks = () if recipe.statistic is Statistic.none else blocks
        products = recipe.adapters is Adapters.products
        self._accumulator = (ProductAccumulator if products else Accumulator).zero(anchor, dtype)
        self.layer_graph: LayerGraph | None = None

    def accept(self, node: int, update: Update) -> None:  # noqa: ARG002 - the sum forgets who
        expected = self._blocks
        if expected is None and self._accumulator.clients:
            expected = self._accumulator.blocks
        if expected is None and not update.precisions:
            wanted = self._recipe.statistic
            raise Refusal(Outcome.missing_statistic, f"the recipe needs {wanted.value}")
        check_update(update, self._anchor, expected)
        check_alike(update, self._accumulator.blocks)
        check_frozen(update.parameters, self._anchor, self.ask.frozen)
        if self.ask.layer_graph:
            check_layer_graph(update.layer_graph, self._anchor)
            self.layer_graph = self.layer_graph or update.layer_graph
        self._accumulator.add(update)

    def finish(self) -> dict[str, Tensor]:
        return self._accumulator.finalize(self._anchor, self._recipe.ridge)


class AlignedFuse:
    """The same, for clients that cannot align themselves: the server does, one reply at a time."""

    name = "fuse"
    kind: Kind = "train"

    def __init__(self, fuse: Fuse, anchor: State, symmetry: Symmetry) -> None:
        self.ask = fuse.ask
        self._fuse = fuse
        self._anchor = anchor
        self._symmetry = symmetry
        self._radii = identity_radii(symmetry, anchor)
        self._match = match_sinkhorn if fuse.ask.matcher is Matcher.sinkhorn else match_weights

    def accept(self, node: int, update: Update) -> AlignmentReport:
        # Checked before it is aligned: an assignment over NaN has no answer.
        check_update(update, self._anchor)
        found = self._match(self._symmetry, self._anchor, update.parameters, self._radii)
        folded = replace(update, parameters=self._symmetry.fold(update.parameters))
        self._fuse.accept(node, folded.moved(found.transform))
        return found.report

    def finish(self) -> dict[str, Tensor]:
        return self._fuse.finish()

    @property
    def layer_graph(self) -> LayerGraph | None:
        return self._fuse.layer_graph


Align = Literal["client", "server", "off"]
Choice = Literal["first", "largest", "medoid", "best"]


class Bootstrap:
    """Find an anchor among clients that never shared a start: a random global model is none.

    Attributes:
        choice: `first` takes the client with the lowest node id; `largest` the one with most examples; `medoid`
            the one that is closest to all others after aligning every pair; `best` the one with the lowest score.
    """

    name = "bootstrap"
    kind: Kind = "train"
    layer_graph: LayerGraph | None = None

    def __init__(
        self,
        template: State,
        choice: Choice = "first",
        symmetry: Symmetry | None = None,
        score: Callable[[State], float] | None = None,
    ) -> None:
        self.ask = Ask(start=Start.own, keep=True)
        self._template = template
        self._choice = choice
        self._symmetry = symmetry
        self._score = score
        # Not a sum: choosing needs the models themselves, so this stage does not stream.
        self._models: dict[int, dict[str, Tensor]] = {}
        self._examples: dict[int, float] = {}

    def accept(self, node: int, update: Update) -> None:
        check_update(update, self._template, ())
        self._examples[node] = update.examples
        if self._choice in ("first", "largest"):
            # Known without its weights, so no more than one model is kept, and only what may be chosen is copied.
            if self._chosen([*self._models, node]) != node:
                return
            self._models.clear()
        self._models[node] = {name: t.clone() for name, t in floating(update.parameters).items()}

    def finish(self) -> dict[str, Tensor]:
        if not self._models:
            return dict(self._template)
        model = {**self._template, **self._models[self._chosen(self._models)]}
        return model if self._symmetry is None else self._symmetry.fold(model)

    def _chosen(self, nodes: Iterable[int]) -> int:
        """Ties go to the lowest node id."""
        return min(sorted(nodes), key=self._cost)

    def _cost(self, node: int) -> float:
        if self._choice == "best" and self._score is not None:
            score = self._score({**self._template, **self._models[node]})
            return math.inf if math.isnan(score) else score
        if self._choice == "medoid" and self._symmetry is not None:
            return self._distance_to_all(node, self._symmetry)
        return -self._examples[node] if self._choice == "largest" else node

    def _distance_to_all(self, node: int, symmetry: Symmetry) -> float:
        anchor = self._models[node]
        others = (model for other, model in self._models.items() if other != node)
        return math.fsum(
            match_weights(symmetry, anchor, model).report.distance_after for model in others
        )


class Evaluate:
    """Let clients evaluate a model as their app does, and the path from it to the model that they sent.

    Only metrics and sums come back. A client that has lost its model since leaves the path out.
    """

    name = "evaluate"
    kind: Kind = "evaluate"
    layer_graph: LayerGraph | None = None

    def __init__(self, model: State, path_points: int = 0) -> None:
        self.ask = Ask(path_points=path_points)
        self._model = model

    def accept(self, node: int, update: Update) -> None:  # noqa: ARG002 - nothing is summed here
        check_examples(update.examples)

    def finish(self) -> dict[str, Tensor]:
        return dict(self._model)


def fusing(
    anchor: State,
    recipe: Recipe,
    ask: Ask,
    align: Align,
    blocks: Collection[Block] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Stage:
    """The fusing stage of a round, with alignment where it is wanted.

    Args:
        anchor: the global model of this round.
        recipe: what clients send and how it is fused.
        ask: with the symmetry that alignment needs.
        align: who aligns.
        blocks: the blocks that every client must know something about; None lets the first decide.
        dtype: of the sums.
    """
    if recipe.adapters is not None:
        ask, blocks = _adapting(anchor, recipe, ask)
    symmetry = ask.symmetry if align != "off" else None
    asked = replace(ask, symmetry=None, statistic=recipe.statistic, shrink=recipe.shrink)
    if align == "client" and symmetry is not None:
        asked = replace(asked, symmetry=symmetry, radii=identity_radii(symmetry, anchor))
    fuse = Fuse(anchor, recipe, asked, blocks, dtype)
    if align == "server" and symmetry is not None:
        return AlignedFuse(fuse, anchor, symmetry)
    return fuse


def _adapting(anchor: State, recipe: Recipe, ask: Ask) -> tuple[Ask, tuple[Block, ...]]:
    """The question for adapters, and the blocks of which they need statistics."""
    found = find_adapters(anchor)
    blocks: tuple[Block, ...] = ()
    if recipe.statistic is Statistic.gram:
        blocks = tuple(blocks_of(found, "up" if ask.frozen == "lora_A" else "down"))
    symmetry = adapters(anchor) if recipe.adapters is Adapters.rotated else ask.symmetry
    encodings = ask.encodings or (sketched(anchor) if recipe.sketched else {})
    return replace(ask, symmetry=symmetry, blocks=blocks, encodings=encodings), blocks
