"""The search of a recipe that compares models: the lines that clients evaluate, and the models that come of them.

refit -> probe a line to the fitted model -> probe one beyond it -> trial -> scale
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.proto.report import Choice, Origin
from fedbasin.proto.request import PathSpec
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.fusion.update import join, tensor_names
from fedbasin.strategies.recipes import ClosedForm, HeadRefit, LossProbe
from fedbasin.strategies.round.absent_clients import for_all_clients
from fedbasin.strategies.round.choice import (
    Candidate,
    best_ahead,
    best_candidate,
    best_point,
    best_scaled,
    candidates,
    choice_of,
    is_slow,
    is_trainable,
)
from fedbasin.strategies.round.fit_plan import is_affordable, plan_refits
from fedbasin.strategies.round.fitted import Fitted, fit
from fedbasin.strategies.round.path_ends import path_ends
from fedbasin.strategies.round.refit import LocalSteps, MeasureNorms, ScaleOutputs, Trial
from fedbasin.strategies.round.round_stages import Round, RoundResult, RoundStages, or_else
from fedbasin.strategies.round.stage import StagePlan, StageResult
from fedbasin.strategies.tensors.state import State, interpolate

# Factors from 0 to 1 by which clients scale the outputs of the model that is served.
_SCALES = 11

# Returns a path as all clients would have evaluated it, those included that the round has not asked.
ForAll: TypeAlias = Callable[[Path | None, PathSpec], Path | None]


@dataclass(frozen=True, eq=False)
class _Lines:
    """The lines on which a search looks for models.

    Attributes:
        anchor: the global model that the round began with.
        fitted: the fused model with fitted layers.
        client: one client's model with a closed-form head; None for none.
        head: tensors of the last layer, whose outputs are scaled; None where it is not known.
        for_all: a path as all clients would have evaluated it.
    """

    anchor: State
    fitted: Fitted
    client: Fitted | None
    head: tuple[str, ...] | None
    for_all: ForAll

    def model_of(self, candidate: Candidate, extended: PathSpec) -> dict[str, Tensor]:
        """Return the model at a point that clients have evaluated."""
        if candidate.origin is Origin.client and self.client is not None:
            return interpolate(self.client.start, self.client.model, candidate.point)
        return interpolate(*self.ends(extended if candidate.is_extended else PathSpec()), candidate.point)

    def ends(self, path: PathSpec) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the two models between which a path runs."""
        return path_ends(path, self.anchor, self.fitted.start, self.fitted.model)


def search(anchor: State, fused: StageResult, refit: ClosedForm, probe: LossProbe, stages: RoundStages) -> Round:
    """Fit layers of the fused model, and choose a point between it and the fitted one."""
    requests = plan_refits(refit, fused.layer_graph, stages.grouping, fused.model)
    if not requests:
        return RoundResult(fused.model)
    client: Fitted | None = None
    models: list[Candidate] = []
    nodes: Sequence[int] = fused.nodes
    if refit.head and stages.bootstrap is not None:
        # The anchor of models that share no start is one client's model, of which the mean may be a poor image.
        head = HeadRefit(refit.head, probe)
        requests_of_head = plan_refits(head, fused.layer_graph, "layer", fused.model)
        client = yield from fit(anchor, nodes, head, requests_of_head, replace(stages, memory=None))
        result = yield client.probe(PathSpec(), probe.points)
        models, nodes = candidates(result.curve, Origin.client), result.nodes
    fitted = yield from _fit_of_own_starts(fused, nodes, stages)
    # A model whose layers are too large or cannot be followed may still have a head that can be solved for.
    if fitted is None:
        fitted = yield from fit(fused.model, nodes, refit, requests, stages)
    last = fused.layer_graph.head if fused.layer_graph else None

    def for_all(curve: Path | None, path: PathSpec) -> Path | None:
        if curve is None or last is None or stages.memory is None or stages.memory.newest is None:
            return curve
        names = tensor_names(last)
        models = ({name: model[name] for name in names} for model in (anchor, fitted.start, fitted.model))
        start, end = path_ends(path, *models)
        return for_all_clients(curve, join(last, start), join(last, end), *stages.memory.newest)

    lines = _Lines(anchor, fitted, client, last and tensor_names(last), for_all)
    chosen = yield from _choose(lines, models, probe, stages)
    if stages.own_refit is None or refit.head is None or last is None:
        return chosen
    head = HeadRefit(refit.head, probe)
    return (yield from or_else(_step_on(chosen, fused, head, probe.points, stages), chosen))


def _fit_of_own_starts(
    fused: StageResult, nodes: Sequence[int], stages: RoundStages
) -> Generator[StagePlan, StageResult, Fitted | None]:
    """Fit all layers of a mean of models that share no start; None where that is not wanted, too large, or fails."""
    if stages.own_refit is None:
        return None
    requests = plan_refits(stages.own_refit, fused.layer_graph, stages.grouping, fused.model)
    if not is_affordable(requests, fused.model):
        return None
    return (yield from or_else(fit(fused.model, nodes, stages.own_refit, requests, stages), None))


def _step_on(chosen: RoundResult, fused: StageResult, head: HeadRefit, points: int, stages: RoundStages) -> Round:
    """Let clients take some local steps from the model that is served, and fit its head again.

    Closed forms bring models that share no start into one. The ensemble of those models stays ahead of it, and a few
    steps from there take most of that back.

    Args:
        chosen: the round so far.
        fused: the result of the stage in which clients trained.
        head: the fit of the head.
        points: number of points between the means of the stepped models, before and after that fit, that clients
            evaluate.
        stages: the stages of this run.
    """
    choice = chosen.choice
    if choice is None:
        return chosen
    start = chosen.model if chosen.served is None else chosen.served
    result = yield StagePlan(partial(LocalSteps, start, stages.accumulate), start, fused.nodes)
    if stages.norms:
        measure = partial(MeasureNorms, result.model, stages.norms, stages.accumulate)
        result = yield StagePlan(measure, result.model, result.nodes)
    requests = plan_refits(head, fused.layer_graph, "layer", result.model)
    fitted = yield from fit(result.model, result.nodes, head, requests, replace(stages, memory=None))
    line = (yield fitted.probe(PathSpec(), points)).curve
    # As it was before its outputs were scaled, which those of the stepped models are not yet.
    before = Candidate(0.0, choice.loss + choice.scale_gain, choice.accuracy)
    # Unlike a closed form, which may overshoot, steps are expected to help: no worse on the same examples is enough.
    models = (model for model in candidates(line, Origin.stepped) if model.matches(before))
    best = min(models, key=lambda model: model.loss, default=before)
    if best is before:
        return chosen
    served = interpolate(fitted.start, fitted.model, best.point)
    choice = replace(
        choice, served=best.origin.name, loss=best.loss, accuracy=best.accuracy, scale=None, scale_gain=0.0
    )
    (last,) = requests[-1].blocks
    if best.accuracy is not None:
        path = PathSpec(best.point, scaled=tensor_names(last))
        choice = yield from _scale(choice, fitted, path, lambda curve, _: curve)
    return replace(chosen, served=_scaled(served, choice, tensor_names(last)), choice=choice)


def _choose(lines: _Lines, models: list[Candidate], probe: LossProbe, stages: RoundStages) -> Round:
    """Compare points between and beyond the fused and the fitted model, and try where training can go on.

    Args:
        lines: the lines of the search.
        models: points of the line of one client's model, which has been evaluated.
        probe: the search.
        stages: the stages of this run, and how far the mean was from the served model when they were last compared.
    """
    fitted, head, for_all = lines.fitted, lines.head, lines.for_all
    result = yield fitted.probe(PathSpec(), probe.points)
    line = for_all(result.curve, PathSpec())
    best = best_point(line)
    path, extended = PathSpec(best), PathSpec(best, probe.extrapolate)
    models = [*candidates(line), *models]
    start: Candidate | None = None
    if probe.extrapolate:
        result = yield replace(fitted, nodes=result.nodes).probe(extended, probe.points, again=True)
        beyond = for_all(result.curve, extended)
        extension = candidates(beyond, is_extended=True)
        models += extension
        # After a search for an anchor it is a trained model, which the mean need not surpass.
        start = extension[0] if extension and lines.client is None else None
        path = PathSpec(best, probe.extrapolate * best_ahead(beyond, 1 / probe.extrapolate))
    if line is None or not line.examples:
        return RoundResult(dict(fitted.start))
    average = replace(models[0], origin=Origin.average)
    served = best_candidate(average, models, line.examples)
    trial = None
    if served is not average and is_slow(average, served, stages.shortfall, start, line.examples, stages.slow):
        make = partial(Trial, fitted.model, fitted.sequence, path)
        trial = (yield StagePlan(make, {}, result.nodes, may_fail=True)).path
    trained_on = Origin.fitted if is_trainable(trial, average.loss - served.loss) else Origin.average
    choice = choice_of(served, average, trained_on, line.examples)
    model = None if served is average else lines.model_of(served, extended)
    place = _place_of(served, extended)
    if head is not None and place is not None:
        choice = yield from _scale(choice, replace(fitted, nodes=result.nodes), replace(place, scaled=head), for_all)
    if head is not None and choice.scale is not None:
        model = _scaled(model or fitted.start, choice, head)
    if trained_on is Origin.average:
        return RoundResult(dict(fitted.start), model, choice=choice)
    return RoundResult(lines.ends(path)[1], model, dict(fitted.start), choice)


def _scale(
    choice: Choice, fitted: Fitted, path: PathSpec, for_all: ForAll
) -> Generator[StagePlan, StageResult, Choice]:
    """Scale the outputs of the model that is served to where the clients' loss is lowest.

    Args:
        choice: the choice of that model.
        fitted: the fused model with fitted layers.
        path: the path of its scaled outputs.
        for_all: a path as all clients would have evaluated it.
    """
    make = partial(ScaleOutputs, fitted.model, fitted.sequence, path, _SCALES)
    result = yield StagePlan(make, {}, fitted.nodes, may_fail=True)
    models = candidates(for_all(result.curve, path))
    scaled = best_scaled(models, choice.examples) if models else None
    if scaled is None:
        return choice
    gain = models[-1].loss - scaled.loss
    return replace(choice, loss=choice.loss - gain, scale=scaled.point, scale_gain=gain)


def _scaled(model: State, choice: Choice, head: Block) -> dict[str, Tensor]:
    """Return a model with the outputs of its last layer times the factor that a round has chosen, if it has."""
    if choice.scale is None:
        return dict(model)
    return {**model, **{name: choice.scale * model[name] for name in head}}


def _place_of(candidate: Candidate, extended: PathSpec) -> PathSpec | None:
    """Return a path that ends in a model which clients have evaluated.

    None where the outputs of the model are not scaled: it is one of a line of its own, or has no right and wrong.
    """
    if candidate.origin is Origin.client or candidate.accuracy is None:
        return None
    if not candidate.is_extended:
        return PathSpec(candidate.point)
    # A path of no length is the line from the fused to the fitted model.
    return replace(extended, extrapolate=extended.extrapolate * candidate.point) if candidate.point else None
