"""A run in the terminal while it goes on: where it is, how its barrier fell, its last rounds, its refusals."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedbasin.proto.fedbasin_pb2 import RoundReport
from fedbasin.server.observe.rounds_table import table
from fedbasin.server.report.charts.text import arrow, number
from fedbasin.server.report.summary import ACCEPTED, Round, summarise
from fedbasin.strategies.round.outcomes import Outcome

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 40  # rounds of a sparkline
_AROUND = 14  # lines of the screen that are not rounds

# In one line of the screen: words, and a measure of `summary.Round`.
_BESIDE = {
    "new model to clients": "fused_barrier_loss",
    "update cosine": "update_cosine.fused",
    "lowest variance": "variance_ratio.lowest",
    "between clients, probe set": "probe_barrier_loss.clients.linear",
}


def show_live(console: Console, reports: Iterable[RoundReport]) -> Iterator[RoundReport]:
    """Draws each report as it comes, and hands it on."""
    seen: list[RoundReport] = []
    brief: list[Round] = []
    with Live(Text("waiting for the first round"), console=console, auto_refresh=False) as live:
        for report in reports:
            seen.append(report)
            brief.append(summarise(report))
            live.update(screen(seen, brief, console.height - _AROUND), refresh=True)
            yield report


def screen(reports: Sequence[RoundReport], rounds: Sequence[Round], lines: int) -> RenderableType:
    """All that is known of a run, with as many of the last rounds as fit into so many lines."""
    newest = rounds[-1]
    last = table(reports[-_fitting(rounds, lines) :])
    parts = [
        _head(newest),
        Text(),
        *_barrier(rounds),
        *_beside(newest),
        last,
        Text(),
        *_refusals(rounds),
    ]
    if newest.problem:
        parts.append(Text(f"The run ended early: {newest.problem}", style="red"))
    return Group(*parts)


def _fitting(rounds: Sequence[Round], lines: int) -> int:
    """How many of the last rounds fit; at least one. A row has a line for each metric, and for each outcome."""
    heights = (max(len(one.metrics), len(one.outcomes), 2) for one in reversed(rounds))
    return max(1, sum(total <= lines for total in accumulate(heights)))


def sparkline(values: Sequence[float]) -> str:
    """Values as blocks from zero to the highest; a dot where there is none."""
    highest = max((value for value in values if math.isfinite(value)), default=0.0) or 1.0
    return "".join(
        _BLOCKS[round(max(value, 0.0) / highest * (len(_BLOCKS) - 1))]
        if math.isfinite(value)
        else "·"
        for value in values
    )


def _head(newest: Round) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        Text(newest.run_id, style="bold"),
        newest.recipe,
        f"round {newest.number} of {newest.of}",
        ProgressBar(total=max(newest.of, 1), completed=newest.number, width=24),
        newest.state,
    )
    return grid


def _barrier(rounds: Sequence[Round]) -> list[RenderableType]:
    """Before and after on one scale, so that the difference shows."""
    shown = [one.barrier for one in rounds if math.isfinite(one.barrier.before)][-_SPARKS:]
    if not shown:
        return []
    both = sparkline([*(one.before for one in shown), *(one.after for one in shown)])
    newest = arrow(shown[-1].before, shown[-1].after)
    return [
        Text.assemble("barrier as trained  ", (both[: len(shown)], "dark_orange"), f"  {newest}"),
        Text.assemble("barrier aligned     ", (both[len(shown) :], "dodger_blue1")),
        Text(),
    ]


def _beside(newest: Round) -> list[RenderableType]:
    """What the newest round says beside its barrier."""
    said = [
        f"{words} {number(newest.measures[measure])}"
        for words, measure in _BESIDE.items()
        if measure in newest.measures
    ]
    return [Text(", ".join(said)), Text()] if said else []


def _refusals(rounds: Sequence[Round]) -> list[RenderableType]:
    """What was refused so far, and what to do about it."""
    total = sum((one.outcomes for one in rounds), Counter[str]())
    return [
        Text(f"{number} {kind}: {Outcome[kind].value if kind in Outcome.__members__ else ''}")
        for kind, number in total.most_common()
        if kind != ACCEPTED
    ]
