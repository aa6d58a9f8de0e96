"""One round of federated learning, from the global model to the next one.

    [bootstrap] -> fuse -> [merge in pairs] -> [measure] -> [refit layer by layer -> head -> probe -> trial -> scale]
        -> [steps -> measure -> head -> probe -> scale]

A round is a generator. It yields a stage, receives the stage's result, and returns the round's model; it knows no
message, no clock and no client. The loop around it (sampling, deadline, quorum, retry, checks, server optimizer,
evaluation, checkpoint, report) is written once, in `fedbasin.server.run`.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import TypeAlias, TypeVar

from torch import Tensor

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import BatchNorm, Block
from fedbasin.proto.report import Choice, Origin
from fedbasin.proto.request import PathSpec, Refit
from fedbasin.strategies.analytic.deep_analytic import unfitted
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.head_memory import HeadMemory
from fedbasin.strategies.fusion.update import join, tensor_names
from fedbasin.strategies.recipes import BlockRefit, ClosedForm, HeadRefit, LayerRefit, LossProbe, Recipe
from fedbasin.strategies.round.absent_clients import for_all_clients
from fedbasin.strategies.round.choice import (
    Candidate,
    best_ahead,
    best_candidate,
    best_point,
    best_scaled,
    candidates,
    is_slow,
    is_trainable,
)
from fedbasin.strategies.round.fit_plan import Grouping, is_affordable, left_out, plan_refits, refit_stage
from fedbasin.strategies.round.path_ends import path_ends
from fedbasin.strategies.round.refit import LocalSteps, MeasureNorms, ProbePath, ScaleOutputs, Trial
from fedbasin.strategies.round.stage import Accumulate, Stage, StagePlan, StageResult
from fedbasin.strategies.tensors.state import State, interpolate


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


# Points between the mean and a distilled model that clients evaluate.
DISTILLED_POINTS = 5

# Factors from 0 to 1 by which clients scale the outputs of the model that is served.
_SCALES = 11

Outcome = TypeVar("Outcome")
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
        own_refit: a fit of all layers that is tried first, because clients share no start; None for the recipe's own.
        memory: the head's sums of earlier rounds; None for none.
        number: number of the round.
        shortfall: loss of the mean above that of the served model when they were last compared; infinite where they
            were not.
    """

    fuse: Callable[[State], Stage]
    bootstrap: Callable[[State], Stage] | None = None
    bootstrap_one_by_one: bool = False
    merge: MergeInPairs | None = None
    norms: tuple[BatchNorm, ...] = ()
    grouping: Grouping = "layer"
    encode: Encode | None = None
    accumulate: Accumulate = Accumulator.zero
    own_refit: LayerRefit | None = None
    memory: HeadMemory | None = None
    number: int = 0
    shortfall: float = inf


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
    apart = recipe.serves_apart and _trains_on_mean(recipe, stages)
    if fused.average is not None and stages.merge is None and (recipe.fusion or fused.layer_graph):
        # Where layers are fitted next, they are fitted to the point.
        ends = apart and recipe.refit is None
        own = RoundResult(dict(fused.average), fused.model) if ends else RoundResult(fused.model)
        points = recipe.points if recipe.fusion else DISTILLED_POINTS
        between = yield from _or(_between(fused.average, fused, points, _origin(recipe), apart=ends), own)
        if recipe.refit is None:
            return between
        fused = replace(fused, model=between.model)
    if recipe.refit is None or stages.merge is not None:
        return RoundResult(fused.model)
    if recipe.chooses and fused.layer_graph is None:
        return RoundResult(fused.model, left_out="layers that every client could report")
    lacking = left_out(recipe.refit, fused.layer_graph, fused.model)
    if lacking and recipe.chooses and isinstance(recipe.refit, HeadRefit):
        return RoundResult(fused.model, left_out=lacking)
    if recipe.probe is not None:
        search = _refit(anchor, fused, recipe.refit, recipe.probe, stages)
        outcome = yield from _or(search, RoundResult(fused.model))
    else:
        outcome = yield from _refit_and_compare(fused, recipe.refit, stages, recipe.points, apart=apart)
    return replace(outcome, left_out=lacking)


def _or(
    further: Generator[StagePlan, StageResult, Outcome], otherwise: Outcome
) -> Generator[StagePlan, StageResult, Outcome]:
    """Run further stages of a round and return their outcome; where one of them fails, the other one."""
    try:
        plan = next(further)
        while True:
            result = yield replace(plan, may_fail=True)
            if result.failed and not plan.may_fail:
                return otherwise
            plan = further.send(result)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome


def _trains_on_mean(recipe: Recipe, stages: RoundStages) -> bool:
    """Return whether a round of a recipe that serves its closed form leaves that form out of training.

    The mean of models that have just begun is far behind, and one round of training on a closed form does not let it
    decay. A head that was fitted to labels on such features can be too large to train on.
    """
    if stages.bootstrap is not None:
        return False
    return stages.number > 1 or (recipe.refit is not None and recipe.refit.head is not None)


def _origin(recipe: Recipe) -> Origin:
    """Return the origin of a point between the mean by examples and the recipe's own model."""
    if recipe.refit is not None:
        return Origin.fitted
    return Origin.weighted if recipe.weighting is not None and recipe.lora is None else Origin.products


def _between(average: State, fused: StageResult, points: int, origin: Origin, *, apart: bool) -> Round:
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
    fitted = _Fitted(average, fused.model, fused.model, 1, sent.nodes)
    line = (yield fitted.probe(PathSpec(), points)).curve
    return _best_on(line, average, fused.model, origin, apart=apart)


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
        return RoundResult(interpolate(average, model, best.point), choice=_choice(best, mean, origin, line.examples))
    served = best if best.point else replace(mean, origin=Origin.average)
    point = interpolate(average, model, best.point) if best.point else None
    return RoundResult(dict(average), point, choice=_choice(served, mean, Origin.average, line.examples))


def _refit_and_compare(
    fused: StageResult, refit: ClosedForm, stages: RoundStages, points: int, *, apart: bool
) -> Round:
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
    fitted = yield from _fit(start, fused.nodes, refit, requests, stages)
    line = (yield replace(fitted.probe(PathSpec(), points), may_fail=True)).curve if points else None
    return _best_on(line, fitted.start, fitted.model, Origin.fitted, apart=apart)


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


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A model with fitted layers, and what a further stage on it needs.

    Attributes:
        start: the model that the fit began with.
        model: the fitted model.
        carries: the tensors that clients lack of it.
        sequence: number of the piece in which these travel.
        nodes: the clients that have the rest.
    """

    start: State
    model: State
    carries: State
    sequence: int
    nodes: Sequence[int]

    def probe(self, path: PathSpec, points: int, *, again: bool = False) -> StagePlan:
        """Return the stage in which clients evaluate a path; `again` where they have the model already."""
        make = partial(ProbePath, self.model, self.sequence, path, points)
        return StagePlan(make, {} if again else self.carries, self.nodes)


def _refit(anchor: State, fused: StageResult, refit: ClosedForm, probe: LossProbe, stages: RoundStages) -> Round:
    """Fit layers of the fused model, and choose a point between it and the fitted one."""
    requests = plan_refits(refit, fused.layer_graph, stages.grouping, fused.model)
    if not requests:
        return RoundResult(fused.model)
    client: _Fitted | None = None
    models: list[Candidate] = []
    nodes: Sequence[int] = fused.nodes
    if refit.head and stages.bootstrap is not None:
        # The anchor of models that share no start is one client's model, of which the mean may be a poor image.
        head = HeadRefit(refit.head, probe)
        requests_of_head = plan_refits(head, fused.layer_graph, "layer", fused.model)
        client = yield from _fit(anchor, nodes, head, requests_of_head, replace(stages, memory=None))
        result = yield client.probe(PathSpec(), probe.points)
        models, nodes = candidates(result.curve, Origin.client), result.nodes
    fitted = yield from _fit_of_own_starts(fused, nodes, stages)
    # A model whose layers are too large or cannot be followed may still have a head that can be solved for.
    if fitted is None:
        fitted = yield from _fit(fused.model, nodes, refit, requests, stages)
    last = fused.layer_graph.head if fused.layer_graph else None

    def for_all(curve: Path | None, path: PathSpec) -> Path | None:
        if curve is None or last is None or stages.memory is None or stages.memory.newest is None:
            return curve
        names = tensor_names(last)
        models = ({name: model[name] for name in names} for model in (anchor, fitted.start, fitted.model))
        start, end = path_ends(path, *models)
        return for_all_clients(curve, join(last, start), join(last, end), *stages.memory.newest)

    names = last and tensor_names(last)
    chosen = yield from _choose(anchor, fitted, client, models, probe, for_all, stages.shortfall, names)
    if stages.own_refit is None or refit.head is None or last is None:
        return chosen
    head = HeadRefit(refit.head, probe)
    return (yield from _or(_step_on(chosen, fused, head, probe.points, stages), chosen))


def _fit(
    start: State, nodes: Sequence[int], refit: ClosedForm, requests: Sequence[Refit], stages: RoundStages
) -> Generator[StagePlan, StageResult, _Fitted]:
    """Fit layers of a model, stage by stage."""
    blocks = [block for request in requests for block in request.blocks]
    encodings = stages.encode(blocks) if stages.encode and blocks else None
    # Each request brings the tensors that the stage before has changed, and clients keep the rest.
    model, carries = start, start
    for request in requests:
        make = partial(refit_stage, refit, model, request, encodings, stages.accumulate, stages.memory, stages.number)
        result = yield StagePlan(make, carries, nodes)
        carries = {name: t for name, t in result.model.items() if t is not model[name]}
        model, nodes = result.model, result.nodes
    return _Fitted(start, model, carries, len(requests), nodes)


def _fit_of_own_starts(
    fused: StageResult, nodes: Sequence[int], stages: RoundStages
) -> Generator[StagePlan, StageResult, _Fitted | None]:
    """Fit all layers of a mean of models that share no start; None where that is not wanted, too large, or fails."""
    if stages.own_refit is None:
        return None
    requests = plan_refits(stages.own_refit, fused.layer_graph, stages.grouping, fused.model)
    if not is_affordable(requests, fused.model):
        return None
    return (yield from _or(_fit(fused.model, nodes, stages.own_refit, requests, stages), None))


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
    fitted = yield from _fit(result.model, result.nodes, head, requests, replace(stages, memory=None))
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


def _choose(
    anchor: State,
    fitted: _Fitted,
    client: _Fitted | None,
    models: list[Candidate],
    probe: LossProbe,
    for_all: Callable[[Path | None, PathSpec], Path | None],
    shortfall: float,
    head: Block | None,
) -> Round:
    """Compare points between and beyond the fused and the fitted model, and try where training can go on.

    Args:
        anchor: the global model that the round began with.
        fitted: the fused model with fitted layers.
        client: one client's model with a closed-form head; None for none.
        models: points of its line.
        probe: the search.
        for_all: a path as all clients would have evaluated it, those included that the round has not asked.
        shortfall: loss of the mean above that of the served model when they were last compared.
        head: tensors of the last layer, whose outputs are scaled; None where it is not known.
    """
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
        start = extension[0] if extension and client is None else None
        path = PathSpec(best, probe.extrapolate * best_ahead(beyond, 1 / probe.extrapolate))
    if line is None or not line.examples:
        return RoundResult(dict(fitted.start))
    average = replace(models[0], origin=Origin.average)
    served = best_candidate(average, models, line.examples)
    trial = None
    if served is not average and is_slow(average, served, shortfall, start, line.examples):
        make = partial(Trial, fitted.model, fitted.sequence, path)
        trial = (yield StagePlan(make, {}, result.nodes, may_fail=True)).path
    trained_on = Origin.fitted if is_trainable(trial, average.loss - served.loss) else Origin.average
    choice = _choice(served, average, trained_on, line.examples)
    model = None if served is average else _model_of(served, anchor, fitted, client, extended)
    place = _place_of(served, extended)
    if head is not None and place is not None:
        choice = yield from _scale(choice, replace(fitted, nodes=result.nodes), replace(place, scaled=head), for_all)
    if head is not None and choice.scale is not None:
        model = _scaled(model or fitted.start, choice, head)
    if trained_on is Origin.average:
        return RoundResult(dict(fitted.start), model, choice=choice)
    _, further = path_ends(path, anchor, fitted.start, fitted.model)
    return RoundResult(further, model, dict(fitted.start), choice)


def _scale(
    choice: Choice, fitted: _Fitted, path: PathSpec, for_all: Callable[[Path | None, PathSpec], Path | None]
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


def _choice(served: Candidate, average: Candidate, trained_on: Origin, examples: float) -> Choice:
    """Return the choice of a round, whose number the loop knows."""
    return Choice(
        served=served.origin.name,
        served_round=0,
        trained_on=trained_on.name,
        loss=served.loss,
        accuracy=served.accuracy,
        average_loss=average.loss,
        average_accuracy=average.accuracy,
        examples=examples,
    )


def _model_of(
    candidate: Candidate, anchor: State, fitted: _Fitted, client: _Fitted | None, extended: PathSpec
) -> dict[str, Tensor]:
    """Return the model at a point that clients have evaluated."""
    if candidate.origin is Origin.client and client is not None:
        return interpolate(client.start, client.model, candidate.point)
    path = extended if candidate.is_extended else PathSpec()
    return interpolate(*path_ends(path, anchor, fitted.start, fitted.model), candidate.point)
