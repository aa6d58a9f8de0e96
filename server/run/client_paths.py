"""What clients measured on their own data: checked client by client, then summed."""

import math
from collections.abc import Mapping

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.diagnostics.probe_sampling import draw
from fedbasin.strategies.messages import Broadcast
from fedbasin.strategies.round.outcomes import Outcome, Refusal
from fedbasin.strategies.tensors.state import State


def checked_path(sums: pb.PathSums, sent: Broadcast, node: int) -> pb.PathSums:
    """One client's path sums, if they are what was asked for; empty where it was not asked.

    Raises:
        Refusal: they are not: a bad number would spoil everybody's.
    """
    count = _asked_points(sent.header, node)
    # A client that has lost its model since training still evaluates the new one.
    if not count or (sent.kind == "evaluate" and not sums.points):
        return pb.PathSums()
    points = [index / (count - 1) for index in range(count)]
    if list(sums.points) != points:
        raise Refusal(
            Outcome.missing_statistic, f"the path has points {sums.points}, not {count} from 0 to 1"
        )
    checked = pb.PathSums(points=points, examples=sums.examples, clients=1)
    for when in ("after",) if sent.kind == "evaluate" else ("before", "after"):
        for name, curve in _checked_curves(sums, when).items():
            getattr(checked, name).extend(curve)
    return checked


def _checked_curves(sums: pb.PathSums, when: str) -> dict[str, tuple[float, ...]]:
    names = f"loss_{when}", f"correct_{when}"
    loss, correct = (tuple(getattr(sums, name)) for name in names)
    try:
        Path(tuple(sums.points), loss, correct, sums.examples)
    except ValueError as error:
        finite = all(map(math.isfinite, (*loss, *correct, sums.examples)))
        outcome = Outcome.malformed if finite else Outcome.non_finite
        raise Refusal(outcome, f"the path {when} alignment: {error}") from error
    return dict(zip(names, (loss, correct), strict=True))


def add_path(total: pb.PathSums, path: pb.PathSums) -> None:
    """Add one client's path sums to the total, in place."""
    if not total.points:
        total.CopyFrom(path)
        return
    for name in ("loss_before", "loss_after", "correct_before", "correct_after"):
        sums = getattr(total, name)
        for index, value in enumerate(getattr(path, name)):
            sums[index] += value
    total.examples += path.examples
    total.clients += path.clients


def checked_variance(header: pb.UpdateHeader, anchor: State) -> dict[str, float]:
    """One client's variance ratios by layer.

    Raises:
        Refusal: a ratio is none, or of no layer of the model.
    """
    for entry in header.variance:
        if entry.layer not in anchor:
            raise Refusal(
                Outcome.malformed, f"a variance ratio of {entry.layer!r}, which the model lacks"
            )
        if not 0 <= entry.ratio < math.inf:
            raise Refusal(
                Outcome.non_finite, f"the variance ratio of {entry.layer!r} is {entry.ratio}"
            )
    return {entry.layer: entry.ratio for entry in header.variance}


def variance_message(ratios: Mapping[str, float]) -> list[pb.VarianceRatio]:
    """Ratios by layer, as they are reported."""
    return [pb.VarianceRatio(layer=layer, ratio=ratio) for layer, ratio in ratios.items()]


def _asked_points(asked: pb.Request, node: int) -> int:
    """Points of the path that this client was to evaluate."""
    probes = not asked.HasField("probe_bound") or draw(node, asked.round) <= asked.probe_bound
    return asked.path_points if probes else 0
