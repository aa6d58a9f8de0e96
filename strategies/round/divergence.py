"""Divergence of a round, seen in its reports: losses that explode, and updates that are out of line."""

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import median

from fedbasin.proto.report import ClientReport, Incident, IncidentKind, RoundReport, StageReport
from fedbasin.strategies.round.evaluate import Evaluate
from fedbasin.strategies.round.fuse import Fuse

# Multiples of the other clients' median from which one client's loss or update is named.
_LARGE_LOSS = 10.0
_LARGE_NORM = 2.5

# Fewer clients have no majority that could be told from a minority.
_FEWEST = 3


def client_incidents(stage: StageReport, small: Callable[[], float]) -> Iterator[Incident]:
    """Yield the accepted clients whose loss or update is out of line with the others'.

    Args:
        stage: report of a stage.
        small: returns the norm up to which an update is small beside the model.
    """
    if stage.stage != Fuse.stage:
        return
    for name in sorted({name for client in stage.accepted for name in client.metrics if _is_loss(name)}):
        losses = {client.node_id: client.metrics[name] for client in stage.accepted if name in client.metrics}
        yield from _out_of_line(losses, _LARGE_LOSS, IncidentKind.client_loss, name)
    norms = {client.node_id: client.update_norm for client in stage.accepted if client.update_norm is not None}
    yield from _out_of_line(norms, _LARGE_NORM, IncidentKind.update_norm, "update norm", small)


def _out_of_line(
    values: Mapping[int, float], most: float, kind: IncidentKind, what: str, small: Callable[[], float] = float
) -> Iterator[Incident]:
    finite = [value for value in values.values() if math.isfinite(value)]
    usual = median(finite) if len(finite) >= _FEWEST else math.inf
    for node, value in values.items():
        if not math.isfinite(value) or (value > most * usual > 0 and value > small()):
            yield Incident(kind.name, f"node {node}: {what} {value:.3g}, the median is {usual:.3g}")


def loss_rise(stages: Mapping[str, float], before: Mapping[str, float], most: float) -> Incident | None:
    """Return the first loss of the new global model that is out of line with the model before; None for none.

    Args:
        stages: losses of the new global model, by name.
        before: losses of the model before.
        most: a multiple of the loss before.
    """
    for name, loss in stages.items():
        earlier = before.get(name, math.inf)
        if math.isfinite(earlier) and (not math.isfinite(loss) or loss > most * earlier > 0):
            return Incident(IncidentKind.loss_rose.name, f"{name} rose from {earlier:.4g} to {loss:.4g}")
    return None


def global_losses(report: RoundReport) -> dict[str, float]:
    """Return the losses of a round's global model by name: the server's own, and the medians of the clients'.

    A median, because one client that reports a loss of 1e300 would undo every round, and of losses that most clients
    report, because one that makes up a name would be alone with it. A loss that is not finite is larger than all others.
    """
    evaluated = [client for s in report.stages if s.stage == Evaluate.stage for client in s.accepted]
    values: dict[str, list[float]] = {}
    for client in evaluated:
        for name, value in _losses(client).items():
            values.setdefault(f"{name} (clients)", []).append(value if math.isfinite(value) else math.inf)
    clients = {name: median(entries) for name, entries in values.items() if 2 * len(entries) > len(evaluated)}
    server = {f"{name} (server)": value for name, value in report.server_metrics.items() if _is_loss(name)}
    return {**clients, **server}


def _losses(client: ClientReport) -> dict[str, float]:
    return {name: value for name, value in client.metrics.items() if _is_loss(name)}


def _is_loss(name: str) -> bool:
    return "loss" in name.lower()
