"""Proof of a stored model's symmetry by execution, for each kind of space and for all spaces at once."""

import re
from collections import defaultdict
from dataclasses import dataclass, replace

from rich.console import Group
from rich.table import Column, Table

from fedbasin.server.files.reading import ModelError
from fedbasin.server.files.stored_symmetry import SymmetricModel, in_module_names
from fedbasin.strategies.symmetry.check import CheckReport, check
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry


@dataclass(frozen=True)
class SymmetryVerdict:
    """The change of a model's outputs under random elements of some spaces.

    Attributes:
        kind: name of the spaces without their numbers; "all" is every space at once.
        spaces: number of spaces.
        double_error: largest relative change of an output in float64.
        single_error: largest relative change of an output in float32.
        guilty: names of the spaces that change the function when they act alone.
        passed: True if the changes are no larger than rounding errors.
    """

    kind: str
    spaces: int
    double_error: float
    single_error: float
    guilty: tuple[str, ...]
    passed: bool


def check_kinds(model: SymmetricModel, symmetry: Symmetry, *, trials: int, seed: int) -> list[SymmetryVerdict]:
    """Check each kind of space, and all spaces together.

    Args:
        model: a model that can be executed.
        symmetry: the part of its symmetry that is checked.
        trials: number of random elements for each kind.
        seed: seed of elements, inputs and parameters.

    Raises:
        ModelError: the model cannot be executed.
        SymmetryError: a space does not fit the module, or the module does not run.
    """
    executable = model.executable
    if executable is None:
        raise ModelError(f"{model.stored.path}: a file does not say which module it is for; give --module or --config")
    whole = in_module_names(symmetry, executable.layout) if model.by_hand else symmetry
    kinds: dict[str, tuple[Space, ...]] = defaultdict(tuple)
    for space in whole.spaces:
        kinds[re.sub(r"\.?\d+", "", space.name) or space.name] += (space,)
    kinds["all"] = whole.spaces
    verdicts = []
    for kind, spaces in kinds.items():
        part = replace(whole, spaces=spaces)
        report = check(executable.module, part, executable.example, trials=trials, seed=seed)
        verdicts.append(_summarise(kind, len(spaces), report))
    return verdicts


def _summarise(kind: str, spaces: int, report: CheckReport) -> SymmetryVerdict:
    return SymmetryVerdict(
        kind=kind,
        spaces=spaces,
        double_error=max(trial.double_error for trial in report.trials),
        single_error=max(trial.single_error for trial in report.trials),
        guilty=report.guilty,
        passed=report.passed,
    )


def render_verdicts(verdicts: list[SymmetryVerdict]) -> Group:
    """Return the verdicts as a table, with the spaces that change the function named below it."""
    numbers = (Column(name, justify="right") for name in ("number", "float64", "float32"))
    table = Table(Column("spaces", overflow="fold"), *numbers, "function", box=None, pad_edge=False)
    for verdict in verdicts:
        errors = (f"{error:.1e}" for error in (verdict.double_error, verdict.single_error))
        function = "kept" if verdict.passed else "BROKEN"
        table.add_row(verdict.kind, str(verdict.spaces), *errors, function)
    guilty = dict.fromkeys(space for verdict in verdicts for space in verdict.guilty)
    return Group(table, *([f"\nbroken by {', '.join(guilty)}"] if guilty else []))
