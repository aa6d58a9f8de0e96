"""Proof by execution for a stored model: random elements of each kind of space, and of all at once."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group
from rich.table import Table

from fedbasin.server.files.building import Built
from fedbasin.server.files.stored_symmetry import spread
from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import tied


@dataclass(frozen=True)
class Verdict:
    """What random elements of some spaces did to the model's outputs.

    Attributes:
        kind: name of the spaces without their numbers; "all" is every space at once.
        spaces: how many there are.
        double_error: largest relative change of an output in float64.
        single_error: the same in float32.
        guilty: the spaces that change the function when they act alone.
        passed: whether the changes are rounding.
    """

    kind: str
    spaces: int
    double_error: float
    single_error: float
    guilty: tuple[str, ...]
    passed: bool

    def as_json(self) -> dict[str, Any]:
        """The same as a mapping for JSON."""
        return asdict(self)


def verdicts(built: Built, symmetry: Symmetry, *, trials: int, seed: int) -> list[Verdict]:
    """Check each kind of space, and all together.

    Raises:
        SymmetryError: a space does not fit the module, or the module does not run.
    """
    whole = spread(symmetry, tied(built.module.state_dict()))
    kinds: dict[str, Symmetry] = {}
    for space in whole.spaces:
        held = kinds.get(_kind(space.name), replace(whole, spaces=()))
        kinds[_kind(space.name)] = replace(held, spaces=(*held.spaces, space))
    return [
        _verdict(kind, built, each, trials, seed) for kind, each in {**kinds, "all": whole}.items()
    ]


def _verdict(kind: str, built: Built, symmetry: Symmetry, trials: int, seed: int) -> Verdict:
    report = check(built.module, symmetry, *built.inputs, trials=trials, seed=seed)
    return Verdict(
        kind=kind,
        spaces=len(symmetry.spaces),
        double_error=max(trial.double_error for trial in report.trials),
        single_error=max(trial.single_error for trial in report.trials),
        guilty=report.guilty,
        passed=report.passed,
    )


def shown(found: list[Verdict]) -> Group:
    """The verdicts for the eye."""
    made = Table(box=None, pad_edge=False)
    made.add_column("spaces", overflow="fold")
    for name in ("number", "float64", "float32"):
        made.add_column(name, justify="right")
    made.add_column("function")
    for one in found:
        errors = (f"{error:.1e}" for error in (one.double_error, one.single_error))
        made.add_row(one.kind, str(one.spaces), *errors, "kept" if one.passed else "BROKEN")
    guilty = dict.fromkeys(space for one in found for space in one.guilty)
    return Group(made, *([f"\nbroken by {', '.join(guilty)}"] if guilty else []))


def _kind(space: str) -> str:
    return re.sub(r"\.?\d+", "", space) or space
