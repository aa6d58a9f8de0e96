"""A table of rounds for the terminal, one row each."""

from collections import Counter
from collections.abc import Iterable, Mapping

from rich.table import Table
from rich.text import Text

from fedbasin.proto.report import ACCEPTED, PathSums, RoundReport
from fedbasin.server.observe.metrics.gauges import barrier_height
from fedbasin.server.printable import printable
from fedbasin.server.report.charts.text import size
from fedbasin.strategies.diagnostics.barrier import linear_barrier

# Widths are fixed, so that rows printed one at a time stay under their headings. In a terminal of 80 columns the last
# column has 23, enough for the longest outcome with the number of its replies.
_COLUMNS = {"round": 7, "ended": 8, "seconds": 7, "updates": 7, "received": 8, "barrier": 14, "model, refusals": None}


def rounds_table(reports: Iterable[RoundReport], *, heading: bool = True) -> Table:
    """Return a table of rounds: end in local time, replies, barriers and metrics of the new model."""
    table = Table(box=None, show_header=heading, pad_edge=False, collapse_padding=True)
    for name, width in _COLUMNS.items():
        table.add_column(name, width=width, overflow="fold")
    for report in reports:
        # As `Text`, or a name such as "[/x]" would be read as markup.
        table.add_row(*map(Text, _cells(report)))
    return table


def _cells(report: RoundReport) -> tuple[str, ...]:
    clients = [client for stage in report.stages for client in stage.clients]
    return (
        f"{report.round}/{report.rounds}",
        f"{report.finished.astimezone():%H:%M:%S}",
        f"{report.seconds:.1f}",
        f"{sum(client.is_accepted for client in clients)}/{len(clients)}",
        size(sum(client.bytes_up for client in clients)),
        _barriers(report.path or PathSums(), report.fused_path or PathSums()),
        "\n".join([*_metrics(report.metrics), *_refusals(Counter(client.outcome for client in clients))]),
    )


def _metrics(metrics: Mapping[str, float]) -> list[str]:
    return [f"{printable(name)} {value:.4g}" for name, value in sorted(metrics.items())]


def _refusals(outcomes: Counter[str]) -> list[str]:
    return [f"{number} {printable(name)}" for name, number in outcomes.items() if name != ACCEPTED]


def _barriers(path: PathSums, fused_path: PathSums) -> str:
    """Return the loss barriers from the anchor, as trained and as aligned, and from the new model."""
    curves = [sums for sums in (path.loss_before, path.loss_after) if sums and path.examples]
    lines = [" → ".join(f"{barrier_height(linear_barrier, path, sums):.3g}" for sums in curves)]
    if fused_path.loss_after and fused_path.examples:
        height = barrier_height(linear_barrier, fused_path, fused_path.loss_after)
        lines.append(f"new {height:.3g}")
    return "\n".join(filter(None, lines))
