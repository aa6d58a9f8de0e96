"""One stored model moved into another's basin, and a saved transform applied again."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from fedbasin.server.files.reading import ModelError, StoredModel, few
from fedbasin.server.report.charts.text import number
from fedbasin.strategies.alignment.alignment_report import AlignmentReport
from fedbasin.strategies.alignment.identity_bound import identity_radii
from fedbasin.strategies.alignment.transformed_state import Moved
from fedbasin.strategies.alignment.weight_matching import Found, find_by_weights, folded
from fedbasin.strategies.symmetry.folding import FoldError
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.parallel import is_finite, one_core
from fedbasin.strategies.tensors.state import State

# What a config says of its own making, and not of the architecture.
_INCIDENTAL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


def align(
    anchor: StoredModel,
    model: StoredModel,
    symmetry: Symmetry,
    asked: Callable[[str], None],
    *,
    certify: bool,
) -> Found:
    """What takes `model` into the basin of `anchor`.

    Args:
        anchor: the model that stays.
        model: the model that is moved.
        symmetry: of both.
        asked: told the name of each of the model's tensors when the search reads it.
        certify: look first for spaces where the identity is provably the best; costs memory.

    Raises:
        ModelError: an entry is infinite or not a number, or a norm cannot be folded.
    """
    for one in (anchor, model):
        _refuse_not_finite(one)
    try:
        own, other = folded(symmetry, anchor), folded(symmetry, _Followed(model, asked))
    except FoldError as error:
        raise ModelError(f"{model.path}: {error}") from error
    radii = identity_radii(symmetry, own) if certify else None
    return find_by_weights(symmetry, own, other, radii)


class _Followed(Mapping[str, Tensor]):
    """A state that tells which tensor is asked for."""

    def __init__(self, state: State, asked: Callable[[str], None]) -> None:
        self._state = state
        self._asked = asked

    def __getitem__(self, name: str) -> Tensor:
        self._asked(name)
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def refuse_other(anchor: StoredModel, model: StoredModel) -> None:
    """Refuse two models that do not have the same tensors.

    Raises:
        ModelError: naming those that differ in name or shape.
    """
    _refuse_missing(anchor, model)
    _refuse_missing(model, anchor)
    ours, theirs = anchor.shapes(), model.shapes()
    differ = [
        f"{name} {tuple(theirs[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in ours.items()
        if theirs[name].shape != tensor.shape
    ]
    if differ:
        raise ModelError(
            f"{model.path} has other shapes than {anchor.path}: {few(differ)}; they are two architectures"
        )


def refuse_other_config(
    anchor: StoredModel, model: StoredModel, ours: Symmetry, theirs: Symmetry
) -> None:
    """Refuse two models whose configs give two symmetries.

    Raises:
        ModelError: naming what the configs say differently.
    """
    if ours == theirs:
        return
    keys = (anchor.config.keys() | model.config.keys()) - _INCIDENTAL
    differ = sorted(key for key in keys if anchor.config.get(key) != model.config.get(key))
    raise ModelError(
        f"{model.path} and {anchor.path} are of two architectures: their configs differ in "
        f"{few(differ) if differ else 'what their files hold'}"
    )


def applied(transform: Transform, model: StoredModel) -> State:
    """A stored model with a transform applied to each tensor when it is asked for.

    Raises:
        ModelError: the transform was made for another model.
    """
    symmetry = transform.symmetry
    try:
        symmetry.check(model.shapes())
        state = folded(symmetry, model)
    except (SymmetryError, FoldError) as error:
        raise ModelError(f"{model.path}: {error}") from error
    moving = {name: e for name, e in transform.elements.items() if not e.is_identity}
    return Moved(symmetry, state, moving)


def as_json(report: AlignmentReport) -> dict[str, Any]:
    """The report as a mapping for JSON."""
    return asdict(report)


def shown(report: AlignmentReport) -> Group:
    """The report for the eye."""
    made = Table(box=None, pad_edge=False)
    made.add_column("space", overflow="fold")
    for name in ("moved", "gain"):
        made.add_column(name, justify="right")
    made.add_column("certified")
    for space in report.spaces:
        made.add_row(
            space.space, number(space.moved), number(space.gain), "yes" if space.certified else ""
        )
    before, after = report.distance_before, report.distance_after
    sweeps = "1 sweep" if report.sweeps == 1 else f"{report.sweeps} sweeps"
    return Group(made, "", f"distance to the anchor {before:.6g} → {after:.6g} in {sweeps}")


def _refuse_missing(one: StoredModel, other: StoredModel) -> None:
    if missing := [name for name in one if name not in other.files]:
        raise ModelError(
            f"{other.path} has no tensor {few(missing)}, and {one.path} has; only models of one architecture, "
            "saved alike, can be aligned"
        )


def _refuse_not_finite(model: StoredModel) -> None:
    with one_core():
        for name in model:
            if not is_finite(model[name]):
                raise ModelError(
                    f"{model.path}: {name!r} has entries that are infinite or not a number; it cannot be aligned"
                )
