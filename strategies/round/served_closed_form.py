"""Closed forms that are served, while clients train on from the mean: points between the two, which clients evaluate."""

from dataclasses import replace
from functools import partial

from fedbasin.proto.report import Origin
from fedbasin.proto.request import PathSpec
from fedbasin.strategies.analytic.deep_analytic import unfitted
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.recipes import BlockRefit, ClosedForm, Recipe
from fedbasin.strategies.round.choice import candidates, choice_of
from fedbasin.strategies.round.fit_plan import plan_refits
from fedbasin.strategies.round.fitted import Fitted, fit
from fedbasin.strategies.round.refit import ProbePath
from fedbasin.strategies.round.round_stages import Round, RoundResult, RoundStages
from fedbasin.strategies.round.stage import StagePlan, StageResult
from fedbasin.strategies.tensors.state import State, interpolate


def trains_on_mean(recipe: Recipe, stages: RoundStages) -> bool:
    """Return whether a round of a recipe that serves its closed form leaves that form out of training.

    The mean of models that have just begun is far behind, and one round of training on a closed form does not let it
    decay. A head that was fitted to labels on such features can be too large to train on.
    """
    if stages.bootstrap is not None:
        return False
    return stages.number > 1 or (recipe.refit is not None and recipe.refit.head is not None)


def origin_of(recipe: Recipe) -> Origin:
    """Return the origin of a point between the mean by examples and the recipe's own model."""
    if recipe.refit is not None:
        return Origin.fitted
    return Origin.weighted if recipe.weighting is not None and recipe.lora is None else Origin.products


def between(average: State, fused: StageResult, points: int, origin: Origin, *, apart: bool) -> Round:
    """Take the point between the mean by examples and another model of the clients' at which their loss is lowest.

    Of adapters' products the mean weighted by inputs is far ahead while clients know little of each other's data. Later
    it keeps what single clients have overdone in directions of their own, and the mean by examples averages it out. An
    ensemble of clients that know few classes each is worse than the mean, and so is what was distilled from it.

    Args:
        average: the mean.
        fused: the result of the stage in which clients trained, with the other model.
        points: number of points that clients evaluate.
        origin: origin of the other model.
        apart: whether they train on from the mean, and the point is served.
    """
    send = partial(ProbePath, average, 0, PathSpec(), 0)
    sent = yield StagePlan(send, average, fused.nodes)
    fitted = Fitted(average, fused.model, fused.model, 1, sent.nodes)
    line = (yield fitted.probe(PathSpec(), points)).curve
    return _best_on(line, average, fused.model, origin, apart=apart)


def refit_and_compare(fused: StageResult, refit: ClosedForm, stages: RoundStages, points: int, *, apart: bool) -> Round:
    """Fit layers of the fused model, and take the best point between it and the fitted one.

    Args:
        fused: the result of the stage in which clients trained.
        refit: what is fitted.
        stages: the stages of this run.
        points: number of points that clients evaluate; 0 takes the fitted model.
        apart: whether they train on from the fused model.
    """
    requests = plan_refits(refit, fused.layer_graph, stages.grouping, fused.model)
    if not requests:
        return RoundResult(fused.model)
    # Blocks of an earlier round are those of other clients' sums, and the first has to be fitted without the later ones.
    start = unfitted(fused.model) if isinstance(refit, BlockRefit) else fused.model
    fitted = yield from fit(start, fused.nodes, refit, requests, stages)
    line = (yield replace(fitted.probe(PathSpec(), points), may_fail=True)).curve if points else None
    return _best_on(line, fitted.start, fitted.model, Origin.fitted, apart=apart)


def _best_on(line: Path | None, average: State, model: State, origin: Origin, *, apart: bool) -> RoundResult:
    """Return the round's end at the best point of a line.

    Args:
        line: the clients' losses between the two models.
        average: the mean of the clients' models, where the line begins.
        model: the model where it ends, which is the result where no client has evaluated the line.
        origin: its origin.
        apart: whether clients train on from the mean, and the point is served.
    """
    models = candidates(line, origin)
    if line is None or not models:
        return RoundResult(dict(average), dict(model)) if apart else RoundResult(dict(model))
    mean = models[0]
    # Of adapters' products the loss alone decides: both means are of the same kind.
    better = [model for model in models if origin is Origin.products or model.matches(mean)]
    best = min(better, key=lambda model: model.loss)
    if not apart:
        return RoundResult(interpolate(average, model, best.point), choice=choice_of(best, mean, origin, line.examples))
    served = best if best.point else replace(mean, origin=Origin.average)
    point = interpolate(average, model, best.point) if best.point else None
    return RoundResult(dict(average), point, choice=choice_of(served, mean, Origin.average, line.examples))
