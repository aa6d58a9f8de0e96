"""A run in the terminal while it goes on: its progress, its barrier by round, its last rounds, its refusals."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedbasin.proto.report import ACCEPTED, RoundReport
from fedbasin.server.observe.rounds_table import rounds_table
from fedbasin.server.printable import printable
from fedbasin.server.report.charts.text import arrow, number
from fedbasin.server.report.summary import RoundSummary, summarise
from fedbasin.strategies.judging.outcomes import Outcome

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 40  # rounds of a sparkline
_OTHER_LINES = 14  # lines of the screen that are not rounds

# The words on the screen, and the measure of a `RoundSummary` that they stand for.
_MEASURES = {
    "new model to clients": "fused_barrier_loss",
    "update cosine": "update_cosine.fused",
    "lowest variance": "variance_ratio.lowest",
    "between clients, probe set": "probe_barrier_loss.clients.linear",
}


def show_live(console: Console, reports: Iterable[RoundReport]) -> Iterator[RoundReport]:
    """Draw the run anew with each report that comes, and yield the report."""
    seen: list[RoundReport] = []
    rounds: list[RoundSummary] = []
    # Drawn on each report and not by a timer: nothing changes in between.
    with Live(Text("waiting for the first round"), console=console, auto_refresh=False) as live:
        for report in reports:
            seen.append(report)
            rounds.append(summarise(report))
            live.update(screen(seen, rounds, console.height - _OTHER_LINES), refresh=True)
            yield report


def screen(reports: Sequence[RoundReport], rounds: Sequence[RoundSummary], lines: int) -> RenderableType:
    """Return the screen of a run, with as many of the last rounds as fit into a number of lines."""
    newest = rounds[-1]
    parts = [
        _head(newest),
        Text(),
        *_barriers(rounds),
        *_measures(newest),
        rounds_table(reports[-_count_fitting(rounds, lines) :]),
        Text(),
        *_refusals(rounds),
    ]
    if newest.problem:
        parts.append(Text(f"The run ended early: {printable(newest.problem)}", style="red"))
    return Group(*parts)


def sparkline(values: Sequence[float]) -> str:
    """Return values as blocks from zero to the highest, with a dot where a value is missing."""
    highest = max((value for value in values if math.isfinite(value)), default=0.0) or 1.0
    return "".join(
        _BLOCKS[round(max(value, 0.0) / highest * (len(_BLOCKS) - 1))] if math.isfinite(value) else "·"
        for value in values
    )


def _count_fitting(rounds: Sequence[RoundSummary], lines: int) -> int:
    """Return the number of last rounds that fit, at least 1."""
    # A row of the table has a line for each metric, and one for each kind of refusal.
    heights = (max(len(r.metrics) + len(r.outcomes.keys() - {ACCEPTED}), 2) for r in reversed(rounds))
    return max(1, sum(total <= lines for total in accumulate(heights)))


def _head(newest: RoundSummary) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        Text(printable(newest.run_id), style="bold"),
        Text(printable(newest.recipe)),
        f"round {newest.number} of {newest.rounds}",
        ProgressBar(total=max(newest.rounds, 1), completed=newest.number, width=24),
        newest.state,
    )
    return grid


def _barriers(rounds: Sequence[RoundSummary]) -> list[RenderableType]:
    barriers = [r.barrier for r in rounds if math.isfinite(r.barrier.before)][-_SPARKS:]
    if not barriers:
        return []
    # One sparkline for both, cut in two: on one scale the difference shows.
    both = sparkline([*(b.before for b in barriers), *(b.after for b in barriers)])
    newest = arrow(barriers[-1].before, barriers[-1].after)
    as_trained, aligned = both[: len(barriers)], both[len(barriers) :]
    return [
        Text.assemble("barrier as trained  ", (as_trained, "dark_orange"), f"  {newest}"),
        Text.assemble("barrier aligned     ", (aligned, "dodger_blue1")),
        Text(),
    ]


def _measures(newest: RoundSummary) -> list[RenderableType]:
    words = [
        f"{name} {number(newest.measures[measure])}"
        for name, measure in _MEASURES.items()
        if measure in newest.measures
    ]
    return [Text(", ".join(words)), Text()] if words else []


def _refusals(rounds: Sequence[RoundSummary]) -> list[RenderableType]:
    """Return a line for each kind of refusal: the number of replies, and advice."""
    total = sum((r.outcomes for r in rounds), Counter[str]())
    return [
        Text(f"{replies} {printable(kind)}: {Outcome[kind].value if kind in Outcome.__members__ else ''}")
        for kind, replies in total.most_common()
        if kind != ACCEPTED
    ]
