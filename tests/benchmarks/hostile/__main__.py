"""`python -m tests.benchmarks.hostile`: accuracy with hostile clients, by recipe, robust rule and attack.

Writes docs/records/hostile-clients.md.
"""

import logging
import platform
from itertools import product

import torch
from rich.console import Console

from tests.benchmarks.figures import PAGE
from tests.benchmarks.hostile.federation import ATTACKS, CLIENTS, DIRICHLET, HOSTILE, ROUNDS, WIDTH, accuracy

RECORD = PAGE.with_name("hostile-clients.md")
RECIPES = ("fedavg", "fisher", "regmean", "features", "auto-head")
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


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    console = Console(highlight=False)
    tables = []
    for recipe in RECIPES:
        rows = {}
        for rule, attack in product(RULES, ATTACKS):
            settings = {"robust": rule, **RULES[rule]} if rule else {}
            value = accuracy(recipe, ATTACKS[attack], **settings)
            rows.setdefault(rule or "none", {})[attack] = value
            console.print(f"[dim]{recipe}, {rule or 'none'}, {attack}: {_cell(value)}[/dim]", soft_wrap=True)
        tables.append(f"## `{recipe}`\n\n{_table(rows)}")
        # At once: an interrupted run keeps what it has measured.
        RECORD.write_text("\n\n".join([_head(), *tables]) + "\n")
    console.print(f"written to {RECORD}", soft_wrap=True)


def _head() -> str:
    return f"""# Hostile clients

Written by `python -m tests.benchmarks.hostile`, with torch {torch.__version__} on {platform.machine()}.

Accuracy on the test examples of scikit-learn's digits after {ROUNDS} rounds. {CLIENTS} clients hold Dirichlet({DIRICHLET}) parts of the training
examples and train a perceptron 64-{WIDTH}-{WIDTH}-10 for five epochs; {len(HOSTILE)} of them are hostile in every round. Rows are values of
the setting `robust`, columns are attacks, one seed. `trimmed-mean`, `krum` and `multi-krum` are told of two hostile
clients; `bulyan`, for which ten clients are too few for that, of one. A dash marks a run that failed. Which rule to
choose is told in [hostile clients](../how-to/hostile-clients.md)."""


def _table(rows: dict[str, dict[str, float | None]]) -> str:
    names = list(ATTACKS)
    lines = [f"| `robust` | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {rule} | {' | '.join(_cell(cells[name]) for name in names)} |" for rule, cells in rows.items()]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".removeprefix("0")


if __name__ == "__main__":
    main()
