"""Rounds for the eye: one row each."""

from collections import Counter
from collections.abc import Iterable
from datetime import UTC

from rich.table import Table

from fedbasin.proto.fedbasin_pb2 import RoundReport
from fedbasin.server.observe.gauges import height
from fedbasin.server.report.charts.text import size
from fedbasin.strategies.diagnostics.barrier import linear_barrier
from fedbasin.strategies.round.outcomes import Outcome

# Widths are fixed, so that rows printed one at a time stay under their headings.
_COLUMNS = {
    "round": 7,
    "ended": 8,
    "seconds": 7,
    "updates": 15,
    "received": 8,
    "barrier": 15,
    "model": None,
}


def table(reports: Iterable[RoundReport], *, heading: bool = True) -> Table:
    """A row per round: its number, its end (local time), its clients, its barrier and the new model."""
    made = Table(box=None, show_header=heading, pad_edge=False, collapse_padding=True)
    for name, width in _COLUMNS.items():
        made.add_column(name, width=width, overflow="fold")
    for report in reports:
        made.add_row(*_cells(report))
    return made


def _cells(report: RoundReport) -> tuple[str, ...]:
    clients = [client for stage in report.stages for client in stage.clients]
    return (
        f"{report.round}/{report.rounds}",
        f"{report.finished.ToDatetime(UTC).astimezone():%H:%M:%S}",
        f"{report.seconds:.1f}",
        _updates(Counter(client.outcome for client in clients)),
        size(sum(client.bytes_up for client in clients)),
        "\n".join(filter(None, (_barrier(report), _fused(report)))),
        "\n".join(f"{name} {value:.4g}" for name, value in sorted(report.metrics.items())),
    )


def _updates(outcomes: Counter[str]) -> str:
    """How many of the replies were accepted, and why the others were not."""
    accepted = outcomes[Outcome.accepted.name]
    refused = [
        f"{number} {name}" for name, number in outcomes.items() if name != Outcome.accepted.name
    ]
    return "\n".join([f"{accepted}/{outcomes.total()}", *refused])


def _fused(report: RoundReport) -> str:
    """The loss barrier from the new global model to the clients."""
    path = report.fused_path
    if not (path.loss_after and path.examples):
        return ""
    return f"new {height(linear_barrier, path, path.loss_after):.3g}"


def _barrier(report: RoundReport) -> str:
    """The loss barrier, as trained and as aligned."""
    path = report.path
    curves = [sums for sums in (path.loss_before, path.loss_after) if sums and path.examples]
    return " → ".join(f"{height(linear_barrier, path, sums):.3g}" for sums in curves)
