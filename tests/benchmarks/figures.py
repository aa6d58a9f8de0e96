"""What a benchmark ends in, and how it is shown: a table, and whether the goal was met."""

import json
import os
import platform
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "records" / "benchmarks.md"

Say = Callable[[str], None]

_HEAD = """# Benchmarks

Written by `make bench`, or for one figure by `.venv/bin/python -m tests.benchmarks NAME` with `PYTHONPATH=.`;
the scripts are in `tests/benchmarks`. Whatever is compared was measured in the same run, in turns. The machines
are shared: seconds of two sections are not to be compared, ratios within one are.
"""


@dataclass(frozen=True)
class Goal:
    """A figure that was aimed at, the one that was measured, and whether that is good enough."""

    text: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Figure:
    """One benchmark's outcome.

    Attributes:
        title: heading of its section.
        how: what was measured, and how.
        columns, rows: the table; the first column names the rows.
        goals: what was aimed at.
    """

    title: str
    how: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    goals: list[Goal]

    def table(self) -> Table:
        table = Table(title=self.title)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        how = "\n\n".join(map(wrap, self.how.split("\n\n")))
        lines = [f"## {self.title}", "", how, "", _line(self.columns)]
        lines += ["|---" + "|--:" * (len(self.columns) - 1) + "|", *map(_line, self.rows), ""]
        lines += ["| goal | measured | met |", "|---|---|---|"]
        lines += [_line((g.text, g.measured, "yes" if g.met else "**no**")) for g in self.goals]
        return "\n".join([*lines, "", wrap(f"Measured {machine()}."), ""])


def wrap(paragraph: str) -> str:
    """Return a paragraph of a page in lines of at most 120 characters."""
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def show(figure: Figure, console: Console) -> None:
    """Print a figure and whether its goals were met."""
    console.print(figure.table())
    for goal in figure.goals:
        word = "[green]met[/green]" if goal.met else "[red]not met[/red]"
        console.print(f"{word}: {goal.text}; measured {goal.measured}")


def write(figures: Mapping[str, Figure], order: list[str]) -> None:
    """Replace the sections of these figures in the page; the others stay as they were measured."""
    marks = {name: f"<!-- {name} -->\n" for name in order}
    text = PAGE.read_text() if PAGE.is_file() else ""
    sections = {}
    for name, mark in marks.items():
        _, found, rest = text.partition(mark)
        if found:
            sections[name] = rest.partition("<!-- ")[0].rstrip() + "\n"
    sections |= {name: figure.markdown() for name, figure in figures.items()}
    body = "\n".join(marks[name] + sections[name] for name in order if name in sections)
    PAGE.write_text(f"{_HEAD}\n{body}")


def machine() -> str:
    """When and on what, without names of hosts."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "flwr", "numpy"))
    day = datetime.now(UTC).date().isoformat()
    return (
        f"on {day} with {os.cpu_count()} cores ({platform.machine()}), load average "
        f"{os.getloadavg()[1]:.1f}, Python {platform.python_version()}, {packages}"
    )


def in_fresh_process(module: str, *arguments: object) -> Any:
    """What a module prints as JSON on its last line.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *map(str, arguments)]
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | path, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_resident_bytes() -> int:
    """Peak resident memory of this process: not `ru_maxrss`, which begins with that of its parent."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def median_ratio(slower: list[float], faster: list[float]) -> float:
    """Median of the ratios of neighbours in time, which a busy machine slows down alike."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
