"""One round of federated learning, from the global model to the next one.

    [bootstrap] -> fuse -> [merge in pairs] -> [measure] -> [beyond]
        -> [refit layer by layer -> head -> probe -> trial -> scale] -> [steps -> measure -> head -> probe -> scale]

A round is a generator. It yields a stage, receives the stage's result, and returns the round's model; it knows no
message, no clock and no client. The loop around it (sampling, deadline, quorum, retry, checks, server optimizer,
evaluation, checkpoint, report) is written once, in `fedbasin.server.run`.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from fedbasin.proto.report import Step
from fedbasin.strategies.recipes import HeadRefit, Recipe
from fedbasin.strategies.round.choice import SLOW, SLOW_WITH_STEPS
from fedbasin.strategies.round.fit_plan import left_out
from fedbasin.strategies.round.longer_step import lengthen
from fedbasin.strategies.round.refit import MeasureNorms
from fedbasin.strategies.round.round_stages import Round, RoundResult, RoundStages, or_else
from fedbasin.strategies.round.search import search
from fedbasin.strategies.round.served_closed_form import between, origin_of, refit_and_compare, trains_on_mean
from fedbasin.strategies.round.stage import Stage, StagePlan, StageResult
from fedbasin.strategies.tensors.state import State

# Points between the mean and a distilled model that clients evaluate.
DISTILLED_POINTS = 5


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
    fused, step = yield from _lengthened(anchor, fused, recipe, stages)
    slow = SLOW if step is None else SLOW_WITH_STEPS
    outcome = yield from _closed_forms(anchor, fused, recipe, replace(stages, slow=slow))
    return replace(outcome, step=step)


def _lengthened(
    anchor: State, fused: StageResult, recipe: Recipe, stages: RoundStages
) -> Generator[StagePlan, StageResult, tuple[StageResult, Step | None]]:
    """Go beyond the mean where the recipe looks for that, and the mean is a step from the anchor that clients can judge."""
    is_step = stages.bootstrap is None and stages.merge is None and fused.average is None
    can_judge = recipe.refit is None or fused.layer_graph is not None
    if recipe.step is None or not (is_step and can_judge and fused.judges):
        return fused, None
    stay: tuple[dict[str, Tensor], Step | None] = fused.model, None
    model, step = yield from or_else(lengthen(anchor, fused, stages.before, recipe.step), stay)
    return replace(fused, model=model), step


def _closed_forms(anchor: State, fused: StageResult, recipe: Recipe, stages: RoundStages) -> Round:
    """Run the stages in which clients fit layers and compare models.

    Args:
        anchor: the global model that the round began with.
        fused: the result of the stage in which clients trained, with the model that they have ended in.
        recipe: what clients send and how it is fused.
        stages: the stages of this run.
    """
    apart = recipe.serves_apart and trains_on_mean(recipe, stages)
    if fused.average is not None and stages.merge is None and (recipe.fusion or fused.layer_graph):
        # Where layers are fitted next, they are fitted to the point.
        ends = apart and recipe.refit is None
        own = RoundResult(dict(fused.average), fused.model) if ends else RoundResult(fused.model)
        points = recipe.points if recipe.fusion else DISTILLED_POINTS
        line = between(fused.average, fused, points, origin_of(recipe), apart=ends)
        point = yield from or_else(line, own)
        if recipe.refit is None:
            return point
        fused = replace(fused, model=point.model)
    if recipe.refit is None or stages.merge is not None:
        return RoundResult(fused.model)
    if recipe.chooses and fused.layer_graph is None:
        return RoundResult(fused.model, left_out="layers that every client could report")
    lacking = left_out(recipe.refit, fused.layer_graph, fused.model)
    if lacking and recipe.chooses and isinstance(recipe.refit, HeadRefit):
        return RoundResult(fused.model, left_out=lacking)
    if recipe.probe is not None:
        searched = search(anchor, fused, recipe.refit, recipe.probe, stages)
        outcome = yield from or_else(searched, RoundResult(fused.model))
    else:
        outcome = yield from refit_and_compare(fused, recipe.refit, stages, recipe.points, apart=apart)
    return replace(outcome, left_out=lacking)


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
