"""One round of federated learning, from the global model to the next one.

    [bootstrap] -> fuse -> [merge in pairs] -> [measure] -> [refit layer by layer -> head -> probe -> trial]

A round is a generator. It yields a stage, receives the stage's result, and returns the round's model; it knows no
message, no clock and no client. The loop around it (sampling, deadline, quorum, retry, checks, server optimizer,
evaluation, checkpoint, report) is written once, in `fedbasin.server.run`.
"""

import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal, TypeAlias

from torch import Tensor

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import BatchNorm, Block, LayerGraph
from fedbasin.proto.report import Choice, Origin
from fedbasin.proto.request import PathSpec, Refit
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge
from fedbasin.strategies.fusion.head import Evidence
from fedbasin.strategies.recipes import HeadRefit, LayerRefit, LossProbe, Recipe, Target
from fedbasin.strategies.round.accumulate import Accumulate
from fedbasin.strategies.round.choice import best_candidate, candidates, is_trainable
from fedbasin.strategies.round.path_ends import path_ends
from fedbasin.strategies.round.refit import MeasureNorms, ProbePath, RefitHead, RefitLayers, Trial
from fedbasin.strategies.round.stage import Stage, StagePlan, StageResult
from fedbasin.strategies.tensors.state import State, interpolate

Grouping = Literal["layer", "block"]


@dataclass(frozen=True, eq=False)
class RoundResult:
    """The end of a round.

    Attributes:
        model: the model that the next round trains on, before the server optimizer.
        served: the model that is evaluated and handed to the user; None where it is the same.
        average: the mean of the clients' models, from which training can go on as ever; None where it is `model`.
        choice: how the models were chosen; None where clients did not compare any.
        left_out: what of the recipe the model has no layers for; empty where all of it was done.
    """

    model: dict[str, Tensor]
    served: dict[str, Tensor] | None = None
    average: dict[str, Tensor] | None = None
    choice: Choice | None = None
    left_out: str = ""


Round: TypeAlias = Generator[StagePlan, StageResult, RoundResult]
# Chooses how clients send what they know about the layers that a round fits.
Encode: TypeAlias = Callable[[Sequence[Block]], Mapping[Block, Encoding]]
# Merges the models of some clients in pairs.
MergeInPairs: TypeAlias = Callable[[list[int], State], Generator[StagePlan, StageResult, dict[str, Tensor] | None]]


@dataclass(frozen=True, eq=False)
class RoundStages:
    """The stages that a round chooses from.

    Attributes:
        fuse: makes the first stage; it requests the layer graph if the recipe fits layers, and that clients keep
            their models.
        bootstrap: makes the search for an anchor; None where the global model is one.
        bootstrap_one_by_one: whether the clients are asked one after the other, until one replies.
        merge: merges models in pairs after training; None where the sum is the merge.
        norms: the BatchNorm layers whose running statistics are measured anew on the fused model.
        grouping: whether layers are fitted one after the other, or a block of them at a time.
        encode: chooses how clients send their sums; None for exactly.
        accumulate: makes the accumulator of a stage that fits layers.
    """

    fuse: Callable[[State], Stage]
    bootstrap: Callable[[State], Stage] | None = None
    bootstrap_one_by_one: bool = False
    merge: MergeInPairs | None = None
    norms: tuple[BatchNorm, ...] = ()
    grouping: Grouping = "layer"
    encode: Encode | None = None
    accumulate: Accumulate = Accumulator.zero


def run_round(model: State, recipe: Recipe, stages: RoundStages, nodes: Sequence[int]) -> Round:
    """Run one round.

    Args:
        model: the global model that the round begins with.
        recipe: what clients send and how it is fused.
        stages: the stages of this run.
        nodes: the clients that the round has sampled.
    """
    anchor: State = model
    if stages.bootstrap is not None:
        make = partial(stages.bootstrap, anchor)
        anchor = yield from _bootstrap(make, anchor, nodes, one_by_one=stages.bootstrap_one_by_one)
    fused = yield StagePlan(partial(stages.fuse, anchor), anchor, trains=True)
    if stages.merge is not None:
        merged = yield from stages.merge(fused.nodes, anchor)
        fused = fused if merged is None else replace(fused, model=merged)
    if stages.norms:
        measure = partial(MeasureNorms, fused.model, stages.norms, stages.accumulate)
        measured = yield StagePlan(measure, fused.model, fused.nodes, may_fail=True)
        fused = replace(fused, model=measured.model)
    if recipe.refit is None or stages.merge is not None:
        return RoundResult(fused.model)
    outcome = yield from _refit(anchor, fused, recipe.refit, stages)
    return replace(outcome, left_out=left_out(recipe.refit, fused.layer_graph))


def _bootstrap(
    make: Callable[[], Stage], model: State, nodes: Sequence[int], *, one_by_one: bool
) -> Generator[StagePlan, StageResult, dict[str, Tensor]]:
    """Find the model of one client that becomes the anchor."""
    for node in nodes[:-1] if one_by_one else ():
        result = yield StagePlan(make, model, [node], may_fail=True)
        if result.nodes:
            return result.model
    # The last client is the last chance: where it fails too, so does the round.
    return (yield StagePlan(make, model, nodes[-1:] if one_by_one else nodes)).model


def _refit(anchor: State, fused: StageResult, refit: LayerRefit | HeadRefit, stages: RoundStages) -> Round:
    """Fit layers of the fused model, and choose a point between it and the fitted one."""
    requests = plan_refits(refit, fused.layer_graph, stages.grouping)
    if not requests:
        return RoundResult(fused.model)
    blocks = [block for request in requests for block in request.blocks]
    encodings = stages.encode(blocks) if stages.encode and blocks else None
    model, result = fused.model, fused
    # Each request brings the tensors that the stage before has changed, and clients keep the rest.
    carries: State = fused.model
    for request in requests:
        make = partial(_refit_stage, refit, model, request, encodings, stages.accumulate)
        result = yield StagePlan(make, carries, result.nodes)
        carries = {name: t for name, t in result.model.items() if t is not model[name]}
        model = result.model
    probe = refit.probe
    if probe is None:
        return RoundResult(model)
    return (yield from _choose(anchor, fused.model, model, probe, carries, len(requests), result.nodes))


def _choose(
    anchor: State, fused: State, fitted: State, probe: LossProbe, carries: State, sequence: int, nodes: Sequence[int]
) -> Round:
    """Compare points between and beyond the fused and the fitted model, and try where training can go on."""
    make_probe = partial(ProbePath, fitted, sequence, points=probe.points)
    result = yield StagePlan(partial(make_probe, path=PathSpec()), carries, nodes)
    line = result.curve
    models, best = candidates(line), best_point(line)
    path = PathSpec(best)
    if probe.extrapolate:
        extended = PathSpec(best, probe.extrapolate)
        result = yield StagePlan(partial(make_probe, path=extended), {}, result.nodes)
        models += candidates(result.curve, is_extended=True)
        path = PathSpec(best, probe.extrapolate * best_ahead(result.curve, 1 / probe.extrapolate))
    if line is None or not line.examples:
        return RoundResult(dict(fused))
    average = models[0]
    served = best_candidate(average, models)
    trial = None
    if served is not average:
        result = yield StagePlan(partial(Trial, fitted, sequence, path), {}, result.nodes, may_fail=True)
        trial = result.path
    spec = PathSpec(best, probe.extrapolate) if served.is_extended else PathSpec()
    trained_on = Origin.fitted if is_trainable(trial) else Origin.average
    choice = Choice(
        served=(Origin.average if served is average else Origin.fitted).name,
        served_round=0,
        trained_on=trained_on.name,
        loss=served.loss,
        accuracy=served.accuracy,
        average_loss=average.loss,
        average_accuracy=average.accuracy,
        examples=line.examples,
    )
    start, end = path_ends(spec, anchor, fused, fitted)
    served_model = None if served is average else interpolate(start, end, served.point)
    if trained_on is Origin.average:
        return RoundResult(dict(fused), served_model, choice=choice)
    _, further = path_ends(path, anchor, fused, fitted)
    return RoundResult(further, served_model, dict(fused), choice)


def best_point(path: Path | None) -> float:
    """Return the evaluated point of a path at which the clients' loss is lowest.

    Nothing is read into the gaps between points: away from the fitted model the loss need not be convex. Without any
    client's word the start of the path is returned.
    """
    if not (path and path.examples):
        return 0.0
    return min(zip(path.loss, path.points, strict=True))[1]


def best_ahead(path: Path | None, otherwise: float) -> float:
    """Return the best evaluated point of a path apart from its start.

    A round that stayed at its start would only be followed by another like it.

    Args:
        path: a path from the model that the round began with.
        otherwise: the point to take if no client evaluated the path.
    """
    if not (path and path.examples):
        return otherwise
    return min(zip(path.loss[1:], path.points[1:], strict=True))[1]


def left_out(refit: LayerRefit | HeadRefit, layer_graph: LayerGraph | None) -> str:
    """Return what a model has no layers for; empty where all of a recipe's fit can be done."""
    if refit.head and (layer_graph is None or layer_graph.head is None):
        return "a last layer that can be fitted to the targets of the task"
    return "" if layer_graph and layer_graph.levels else "linear layers or convolutions"


def plan_refits(refit: LayerRefit | HeadRefit, layer_graph: LayerGraph | None, grouping: Grouping) -> list[Refit]:
    """Return the layers that a recipe fits, stage by stage; none where the model has no such layers.

    Args:
        refit: what the recipe fits.
        layer_graph: the layers of the clients' model.
        grouping: whether layers are fitted one after the other, or a block of them at a time.
    """
    if layer_graph is None or not layer_graph.levels:
        return []
    stages: list[tuple[tuple[Block, ...], Target]] = []
    if isinstance(refit, LayerRefit):
        apart = {layer_graph.head} if refit.head else set()
        body = (tuple(b for b in level if b not in apart) for level in layer_graph.levels)
        levels = [level for level in body if level]
        groups = levels if grouping == "layer" else _by_block(levels)
        stages = [(group, refit.target) for group in groups]
    if refit.head and layer_graph.head is not None:
        stages.append(((layer_graph.head,), Target[layer_graph.head_target or Target.labels.name]))
    if not stages:
        return []
    requests = [Refit(blocks, target.name, index) for index, (blocks, target) in enumerate(stages)]
    # The output of the layers below is settled when the last layer is fitted.
    return [*requests[:-1], replace(requests[-1], norms=layer_graph.norms)]


def _by_block(levels: Sequence[tuple[Block, ...]]) -> list[tuple[Block, ...]]:
    """Group levels: one stage from the second level of each block but the last on, one for each level outside.

    Only the first level of a stage reads what fused layers compute; the levels behind it read what the client's own
    model computes. Fusing weights disturbs attention most, so the level behind it comes first. What the last block
    leaves over, the head behind it corrects.
    """
    modules = _modules([level[0][0] for level in levels])
    runs = [list(run) for _, run in groupby(range(len(levels)), modules.__getitem__)]
    blocks = [run for run in runs if len(run) > 1]
    starts = {run[1] for run in blocks[:-1]} | {run[0] for run in runs if len(run) == 1}
    stages: list[tuple[Block, ...]] = [()]
    for index, level in enumerate(levels):
        stages = [*stages, level] if index in starts else [*stages[:-1], stages[-1] + level]
    return [stage for stage in stages if stage]


def _modules(names: Sequence[str]) -> list[str]:
    """Return for each level its innermost numbered module with more levels, as a transformer's block; else its name."""
    numbered = [[name[: match.end()] for match in re.finditer(r"\d+\.", name)] for name in names]
    counts = Counter(prefix for prefixes in numbered for prefix in prefixes)
    return [
        next((prefix for prefix in reversed(prefixes) if counts[prefix] > 1), name)
        for name, prefixes in zip(names, numbered, strict=True)
    ]


def _refit_stage(
    refit: LayerRefit | HeadRefit,
    model: State,
    request: Refit,
    encodings: Mapping[Block, Encoding] | None,
    accumulate: Accumulate,
) -> Stage:
    ridge, holds_out = refit.head or Evidence(), refit.probe is not None
    if request.target == Target.labels.name:
        return RefitHead(model, request, ridge, encodings=encodings, accumulate=accumulate, holds_out=holds_out)
    if request.target == Target.values.name:
        # The evidence needs the energy of the targets, which only labels tell.
        strength = ridge.strength if isinstance(ridge, Ridge) else ridge.otherwise
        return RefitLayers(model, request, strength, encodings=encodings, accumulate=accumulate, holds_out=holds_out)
    if not isinstance(refit, LayerRefit):
        raise TypeError(f"a fit of the head alone has no layers with the target {request.target}")
    return RefitLayers(
        model, request, refit.ridge, refit.fraction, encodings=encodings, accumulate=accumulate, holds_out=holds_out
    )
