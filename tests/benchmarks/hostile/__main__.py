"""`python -m tests.benchmarks.hostile [RECIPE[/RULE] ...]`: accuracy with hostile clients, by recipe, rule and attack.

Writes docs/records/hostile-clients.md: the sections of these recipes, or all of them; with a rule (`fedavg/none`,
`regmean/multi-krum`) this row alone.
"""

import logging
import platform
import sys
from collections.abc import Iterator
from itertools import product

import torch
from rich.console import Console

from tests.benchmarks.figures import PAGE, wrap
from tests.benchmarks.hostile.federation import ATTACKS, CLIENTS, DIRICHLET, HOSTILE, ROUNDS, WIDTH, accuracy

RECORD = PAGE.with_name("hostile-clients.md")
RECIPES = ("fedavg", "fisher", "regmean", "features", "auto")
# Bulyan needs 4 f + 3 clients: ten are too few for two hostile ones, so it is told one.
RULES: dict[str, dict[str, object]] = {
    "none": {},
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
    for recipe, rule in _cells(names):
        settings = {} if rule == "none" else {"robust": rule, **RULES[rule]}
        row = []
        for name, attack in ATTACKS.items():
            row.append(_cell(accuracy(recipe, attack, **settings)))
            console.print(f"[dim]{recipe}, {rule}, {name}: {row[-1]}[/dim]", soft_wrap=True)
        # At once: an interrupted run keeps what it has measured.
        _write(recipe, rule, row)
    console.print(f"written to {RECORD}", soft_wrap=True)


def _cells(names: list[str]) -> Iterator[tuple[str, str]]:
    for name in names or RECIPES:
        recipe, _, rule = name.partition("/")
        yield from product([recipe], [rule] if rule else RULES)


def _write(recipe: str, rule: str, row: list[str]) -> None:
    """Replace a row of the record; the others stay as they were measured, if they have the same columns."""
    _, *parts = RECORD.read_text().split("\n## ") if RECORD.is_file() else [""]
    sections = dict(part.rstrip().split("\n\n", 1) for part in parts)
    header, *lines = sections.get(f"`{recipe}`", "").split("\n")
    rows = {line.split(" | ")[0]: line for line in lines[1:]} if header == _line("`robust`", list(ATTACKS)) else {}
    rows |= {f"| {rule}": _line(rule, row)}
    sections[f"`{recipe}`"] = _table([rows[f"| {name}"] for name in RULES if f"| {name}" in rows])
    present = [f"`{name}`" for name in RECIPES if f"`{name}`" in sections]
    RECORD.write_text("\n\n".join([_head(), *(f"## {name}\n\n{sections[name]}" for name in present)]) + "\n")


def _head() -> str:
    written = f"""Written by `python -m tests.benchmarks.hostile` with `PYTHONPATH=.`, torch {torch.__version__} on
{platform.machine()}; with names of recipes, for these alone."""
    setting = f"""Accuracy on the test examples of scikit-learn's digits after {ROUNDS} rounds. {CLIENTS} clients hold
Dirichlet({DIRICHLET}) parts of the training examples and train a perceptron 64-{WIDTH}-{WIDTH}-10 for five epochs;
{len(HOSTILE)} of them are hostile in every round. Rows are values of the setting `robust`, columns are attacks, one
seed. A model of NaN is refused at once: its column is what the honest clients reach alone. `trimmed-mean`, `krum` and `multi-krum` are told of two hostile clients; `bulyan`, for which ten clients are too
few for that, of one. A dash marks a run that failed; an empty cell was not measured. Which rule to choose is told in
[hostile clients](../how-to/hostile-clients.md)."""
    return "\n\n".join(["# Hostile clients", *map(wrap, (written, setting))])


def _table(rows: list[str]) -> str:
    return "\n".join([_line("`robust`", list(ATTACKS)), f"|---|{'---|' * len(ATTACKS)}", *rows])


def _line(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".removeprefix("0")


if __name__ == "__main__":
    main(sys.argv[1:])
