"""Checks of the diagnostics that a client sends: losses along a path, and variance ratios."""

import math

from fedbasin.proto.reply import Reply
from fedbasin.proto.report import PathSums
from fedbasin.proto.request import Request
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.diagnostics.probe_sampling import draw
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.tensors.state import State


def checked_path(reply: Reply, request: Request, node: int) -> PathSums | None:
    """Return one client's sums along the requested path; None where the client was not asked for any.

    Raises:
        Refusal: the sums are not those that were requested; a bad number would spoil the sum of all clients.
    """
    count = _requested_points(request, node)
    path = reply.path or PathSums()
    # A client that has lost its model since training, or has no mod, still evaluates the new one.
    may_lack = request.kind == "evaluate" and request.refit is None
    if not count or ((may_lack or not reply.has_mod) and not path.points):
        return None
    points = tuple(index / (count - 1) for index in range(count))
    if path.points != points:
        raise Refusal(Outcome.missing_statistic, f"the path has points {list(path.points)}, not {count} from 0 to 1")
    aligned = _checked_curves(path, "after", path.loss_after, path.correct_after)
    trained: tuple[tuple[float, ...], tuple[float, ...]] = (), ()
    if request.kind != "evaluate":
        trained = _checked_curves(path, "before", path.loss_before, path.correct_before)
    return PathSums(points, trained[0], aligned[0], trained[1], aligned[1], path.examples, clients=1)


def _checked_curves(
    path: PathSums, when: str, loss: tuple[float, ...], correct: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        Path(path.points, loss, correct, path.examples)
    except ValueError as error:
        finite = all(map(math.isfinite, (*loss, *correct, path.examples)))
        outcome = Outcome.malformed if finite else Outcome.non_finite
        raise Refusal(outcome, f"the path {when} alignment: {error}") from error
    return loss, correct


def checked_variance(reply: Reply, anchor: State) -> dict[str, float]:
    """Return one client's variance ratios by layer.

    Raises:
        Refusal: a ratio is negative or not finite, or names a layer that the model lacks.
    """
    for entry in reply.variance:
        if entry.layer not in anchor:
            raise Refusal(Outcome.malformed, f"a variance ratio of {entry.layer!r}, which the model lacks")
        if not 0 <= entry.ratio < math.inf:
            raise Refusal(Outcome.non_finite, f"the variance ratio of {entry.layer!r} is {entry.ratio}")
    return {entry.layer: entry.ratio for entry in reply.variance}


def _requested_points(request: Request, node: int) -> int:
    """Return the number of points of the path that this client was to evaluate."""
    bound = request.probe_bound
    probes = bound is None or draw(node, request.round) <= bound
    return request.path_points if probes else 0
