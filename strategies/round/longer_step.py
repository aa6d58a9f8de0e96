"""A longer step than the one to the mean of the clients' models, as far as examples that nobody trains on say it pays.

    theta     the global model that the round began with          v    its move in the round before
    mean      the mean of the clients' models

    mean + b v                          0 <= b <= 1               momentum
    theta + s (mean + b v - theta)      1 <= s <= 2               length

Momentum and longer steps save rounds where clients' moves partly cancel, and ruin models where they do not: FedAvgM
(Hsu et al. 2019, arXiv 1909.06335) and FedExP (Jhunjhunwala et al. 2023, arXiv 2301.09604) choose their factors before
anything is seen, or from the lengths of the moves alone. Here each round's clients evaluate the loss at some points of
both lines. On examples that a client trains on the longest step is the best one, so only others count.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from fedbasin.proto.report import PathSums, Step
from fedbasin.proto.request import PathSpec
from fedbasin.strategies.diagnostics.barrier import grid
from fedbasin.strategies.recipes import StepSearch
from fedbasin.strategies.round.choice import is_more_than_chance
from fedbasin.strategies.round.fitted import Fitted
from fedbasin.strategies.round.path_ends import path_ends
from fedbasin.strategies.round.refit import ProbeStep
from fedbasin.strategies.round.stage import StagePlan, StageResult
from fedbasin.strategies.tensors.state import State, continued


def lengthen(
    anchor: State, fused: StageResult, before: State, search: StepSearch
) -> Generator[StagePlan, StageResult, tuple[dict[str, Tensor], Step]]:
    """Let clients evaluate steps beyond the mean, and return the best model and its step.

    Args:
        anchor: the global model that the round began with.
        fused: the result of the stage in which clients trained, some of which can judge.
        before: the global model that the round before began with; empty where this round is not to go on from there.
        search: the points that clients evaluate.
    """
    mean, points = fused.model, grid(search.points)
    line = Fitted(mean, mean, mean, 0, fused.judges)
    path = PathSpec(0.0, search.length)
    result = yield _probe(line, path, search)
    examples = sum(client.examples for client in result.paths)
    if not examples:
        return mean, Step()
    # Of the points from the global model on, the one at which the whole step ends.
    whole = round((search.points - 1) / search.length)
    step = Step(mean_loss=_loss(result.paths, whole), examples=examples)
    if before:
        moved = continued(mean, anchor, before)
        line = Fitted(mean, moved, moved, 1, result.nodes)
        along = yield _probe(line, PathSpec(), search)
        step = replace(step, momentum=points[best_step(along.paths, 0)])
        if step.momentum:
            path = PathSpec(step.momentum, search.length)
            result = yield _probe(replace(line, carries={}, nodes=along.nodes), path, search)
    best = best_step(result.paths, whole)
    step = replace(step, length=search.length * points[best], loss=_loss(result.paths, best))
    if best == whole and not step.momentum:
        return mean, step
    path = replace(path, extrapolate=step.length)
    return path_ends(path, anchor, line.start, line.model)[1], step


def _probe(line: Fitted, path: PathSpec, search: StepSearch) -> StagePlan:
    return StagePlan(partial(ProbeStep, line.model, line.sequence, path, search.points), line.carries, line.nodes)


def best_step(paths: Sequence[PathSums], shortest: int) -> int:
    """Return the index of the point of a line at which the clients' loss is lowest; the shortest step if none is better.

    A better one lowers the loss of all clients together by more than chance, and is no worse for at least half of them:
    what one client claims moves nothing that the others' losses speak against.

    Args:
        paths: the sums of each client, at the same points.
        shortest: index of the point of the shortest step.
    """
    judges = [path for path in paths if path.examples]
    if not judges:
        return shortest
    best, lowest = shortest, _loss(judges, shortest)
    examples = sum(path.examples for path in judges)
    in_nats = all(path.correct_after for path in judges)
    for index in range(shortest + 1, len(judges[0].points)):
        loss = _loss(judges, index)
        better = sum(path.loss_after[index] <= path.loss_after[shortest] for path in judges)
        is_better = is_more_than_chance(loss, _loss(judges, shortest), examples, in_nats=in_nats)
        if loss < lowest and is_better and 2 * better >= len(judges):
            best, lowest = index, loss
    return best


def _loss(paths: Sequence[PathSums], index: int) -> float:
    """Return the mean loss of all clients' examples at a point."""
    examples = sum(path.examples for path in paths)
    return sum(path.loss_after[index] for path in paths if path.examples) / examples if examples else 0.0
