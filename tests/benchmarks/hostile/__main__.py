"""`python -m tests.benchmarks.hostile [RECIPE ...]`: accuracy with hostile clients, by recipe, robust rule and attack.

Writes docs/records/hostile-clients.md, the sections of these recipes or all of them.
"""

import logging
import platform
import sys
from itertools import product

import torch
from rich.console import Console

from tests.benchmarks.figures import PAGE, wrap
from tests.benchmarks.hostile.federation import ATTACKS, CLIENTS, DIRICHLET, HOSTILE, ROUNDS, WIDTH, accuracy

RECORD = PAGE.with_name("hostile-clients.md")
RECIPES = ("fedavg", "fisher", "regmean", "features", "auto")
# Bulyan needs 4 f + 3 clients: ten are too few for two hostile ones, so it is told one.
RULES = {
    "": {},
    "median": {},
    "trimmed-mean": {"hostile_clients": 2},
    "krum": {"hostile_clients": 2},
    "multi-krum": {"hostile_clients": 2},
    "bulyan": {"hostile_clients": 1},
    "geometric-median": {},
    "norm-clipping": {},
    "centred-clipping": {},
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    console = Console(highlight=False)
    for recipe in names or RECIPES:
        rows: dict[str, dict[str, float | None]] = {}
        for rule, attack in product(RULES, ATTACKS):
            settings = {"robust": rule, **RULES[rule]} if rule else {}
            value = accuracy(recipe, ATTACKS[attack], **settings)
            rows.setdefault(rule or "none", {})[attack] = value
            console.print(f"[dim]{recipe}, {rule or 'none'}, {attack}: {_cell(value)}[/dim]", soft_wrap=True)
        # At once: an interrupted run keeps what it has measured.
        _write(recipe, _table(rows))
    console.print(f"written to {RECORD}", soft_wrap=True)


def _write(recipe: str, table: str) -> None:
    """Replace the section of a recipe in the record; the others stay as they were measured."""
    _, *parts = RECORD.read_text().split("\n## ") if RECORD.is_file() else [""]
    sections = dict(part.rstrip().split("\n\n", 1) for part in parts) | {f"`{recipe}`": table}
    present = [f"`{name}`" for name in RECIPES if f"`{name}`" in sections]
    RECORD.write_text("\n\n".join([_head(), *(f"## {name}\n\n{sections[name]}" for name in present)]) + "\n")


def _head() -> str:
    written = f"""Written by `python -m tests.benchmarks.hostile` with `PYTHONPATH=.`, torch {torch.__version__} on
{platform.machine()}; with names of recipes, for these alone."""
    setting = f"""Accuracy on the test examples of scikit-learn's digits after {ROUNDS} rounds. {CLIENTS} clients hold
Dirichlet({DIRICHLET}) parts of the training examples and train a perceptron 64-{WIDTH}-{WIDTH}-10 for five epochs;
{len(HOSTILE)} of them are hostile in every round. Rows are values of the setting `robust`, columns are attacks, one
seed. `trimmed-mean`, `krum` and `multi-krum` are told of two hostile clients; `bulyan`, for which ten clients are too
few for that, of one. A dash marks a run that failed. Which rule to choose is told in
[hostile clients](../how-to/hostile-clients.md)."""
    return "\n\n".join(["# Hostile clients", *map(wrap, (written, setting))])


def _table(rows: dict[str, dict[str, float | None]]) -> str:
    names = list(ATTACKS)
    lines = [f"| `robust` | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {rule} | {' | '.join(_cell(cells[name]) for name in names)} |" for rule, cells in rows.items()]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".removeprefix("0")


if __name__ == "__main__":
    main(sys.argv[1:])
