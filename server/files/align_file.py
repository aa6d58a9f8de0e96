"""Alignment of one stored model to another, and the application of a saved transform, proven before it is written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group
from rich.table import Column, Table
from torch import Tensor

from fedbasin.proto.report import AlignmentReport
from fedbasin.server.files.data.stored_matching import StoredMatching
from fedbasin.server.files.library.executable_model import ExecutableModel, change_of_function
from fedbasin.server.files.library.tensor_layout import ModuleState, StoredState
from fedbasin.server.files.reading import ModelError, StoredModel, few, refuse_not_finite
from fedbasin.server.files.shared_tensors import shared_tensors
from fedbasin.server.files.stored_symmetry import SymmetricModel
from fedbasin.server.report.charts.text import number
from fedbasin.strategies.alignment.identity_bound import identity_bounds
from fedbasin.strategies.alignment.transformed_state import TransformedState
from fedbasin.strategies.alignment.weight_matching import fold_state
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.state import State

# Far above rounding in float64, far below the effect of a tensor that is left behind.
_TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False)
class FileAlignment:
    """The transform that takes a model into the basin of an anchor.

    Attributes:
        transform: the transform, in the names of the model's symmetry.
        report: how far each space moved, and what it gained.
        apart: names of tensors that the anchor does not share.
    """

    transform: Transform
    report: AlignmentReport
    apart: tuple[str, ...]


def align(
    anchor: StoredModel,
    model: SymmetricModel,
    symmetry: Symmetry,
    matching: StoredMatching,
    on_read: Callable[[str], None],
    *,
    certify: bool,
) -> FileAlignment:
    """Find the transform that takes `model` into the basin of `anchor`, on the tensors that both have.

    Args:
        anchor: the model that stays as it is.
        model: the model that the transform is for.
        symmetry: the part of its symmetry that is aligned.
        matching: the matcher.
        on_read: called with the name of each tensor of `model` that the search reads.
        certify: prove first at which spaces the identity is optimal, for matchers by weights; costs memory.

    Raises:
        ModelError: the models share nothing or do not run on the data, an entry is infinite or not a number, or a norm
            cannot be folded.
    """
    shared = shared_tensors(anchor, model, symmetry)
    for state, stored in ((shared.anchor, anchor), (model.state, model.stored)):
        refuse_not_finite(state, stored.path)
    states = [
        fold_stored(stored.path, shared.symmetry, state)
        for stored, state in ((anchor, shared.anchor), (model.stored, _WatchedState(shared.model, on_read)))
    ]
    bounds = identity_bounds(shared.symmetry, states[0]) if certify else None
    match = matching.match(shared.symmetry, states[0], states[1], bounds=bounds)
    spaces = tuple(space for space in symmetry.spaces if space.name in match.transform.elements)
    transform = Transform(replace(symmetry, spaces=spaces), match.transform.elements)
    return FileAlignment(transform, match.report, shared.apart)


class _WatchedState(Mapping[str, Tensor]):
    """A state that calls back with the name of each tensor that is read."""

    def __init__(self, state: State, on_read: Callable[[str], None]) -> None:
        self._state = state
        self._on_read = on_read

    def __getitem__(self, name: str) -> Tensor:
        self._on_read(name)
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class _DoubleState(Mapping[str, Tensor]):
    """A state in double precision, converted tensor by tensor."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        return tensor.double() if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def apply_transform(transform: Transform, model: SymmetricModel) -> State:
    """Return the stored tensors of a model, each of which is transformed when it is read.

    Raises:
        ModelError: the transform was made for another model.
    """
    try:
        transform.symmetry.check({name: tensor.to("meta") for name, tensor in model.state.items()})
    except SymmetryError as error:
        raise ModelError(f"{model.stored.path}: {error}") from error
    return transform_stored(transform, model, model.stored, model.stored.path)


def prove_if_possible(transform: Transform, model: SymmetricModel, *, wanted: bool) -> float | None:
    """Execute a model with its stored tensors and with those that are to be written, in float64.

    Args:
        transform: the transform that is to be applied.
        model: the model.
        wanted: False proves nothing.

    Returns:
        The largest relative change of an output; None if nothing was proven, because it was not wanted, or because a
        symmetry that was given by hand came without a module.

    Raises:
        ModelError: the function changes, or the model does not run on its example.
    """
    if not wanted or model.executable is None:
        return None
    return prove_function(transform, model, model.executable, model.stored, model.stored.path)


def prove_function(
    transform: Transform, model: SymmetricModel, executable: ExecutableModel, stored: State, path: Path
) -> float:
    """Execute a module with stored tensors and with the transformed ones, in float64.

    Args:
        transform: the transform that is to be applied.
        model: a model of this architecture.
        executable: its module.
        stored: the tensors, in the names of the files.
        path: where they are stored, for errors.

    Returns:
        The largest relative change of an output.

    Raises:
        ModelError: the function changes, or the module does not run on its example.
    """
    double = _DoubleState(stored)
    change = change_of_function(executable, double, transform_stored(transform, model, double, path))
    # Also where it is not a number.
    if not change < _TOLERANCE:
        raise ModelError(
            f"{path}: its outputs would change by {change:.1e} in float64, so nothing is written; report this model, or "
            "choose other spaces with --spaces"
        )
    return change


def render_alignment(report: AlignmentReport, lines: Sequence[str]) -> Group:
    """Return the report of an alignment as a table, with the distances and further lines below it."""
    numbers = (Column(name, justify="right") for name in ("moved", "gain"))
    table = Table(Column("space", overflow="fold"), *numbers, "certified", box=None, pad_edge=False)
    for space in report.spaces:
        certified = "yes" if space.certified else ""
        table.add_row(space.space, number(space.moved), number(space.gain), certified)
    distances = f"{report.distance_before:.6g} → {report.distance_after:.6g}"
    sweeps = "1 sweep" if report.sweeps == 1 else f"{report.sweeps} sweeps"
    return Group(table, "", f"distance to the anchor {distances} in {sweeps}", *lines)


def describe_proof(change: float | None, model: SymmetricModel) -> str:
    """Return a sentence on the proof of what was written."""
    return describe_change(change, proves=model.executable is None)


def describe_change(change: float | None, *, proves: bool) -> str:
    """Return a sentence on the largest change of an output; None says that nothing was executed.

    Args:
        change: the change.
        proves: whether a proof was wanted, so that without one the model cannot be executed.
    """
    if change is not None:
        return f"proven by execution: outputs change by {change:.1e} in float64"
    reason = "the model cannot be executed; give --module" if proves else "--no-prove"
    return f"not proven by execution: {reason}"


def describe_rest(model: SymmetricModel, apart: tuple[str, ...] = ()) -> list[str]:
    """Return sentences on the tensors that stay, and on those that the anchor does not share."""
    unread = model.layout.unread if model.executable is None or model.by_hand else model.executable.layout.unread
    kind = model.executable.kind if model.executable else "the model"
    return [
        *([f"not read by {kind}, and as it was: {few(unread)}"] if unread else []),
        *([f"not shared by the anchor: {few(apart)}"] if apart else []),
    ]


def transform_stored(transform: Transform, model: SymmetricModel, stored: State, path: Path) -> State:
    """Return stored tensors under a transform, each of which is computed when it is read.

    Args:
        transform: the transform.
        model: a model of this architecture.
        stored: the tensors, in the names of the files.
        path: where they are stored, for errors.

    Raises:
        ModelError: a norm cannot be folded.
    """
    state = fold_stored(path, transform.symmetry, ModuleState(model.layout, stored))
    # Without identity elements, tensors that stay are written byte for byte.
    elements = {name: e for name, e in transform.elements.items() if not e.is_identity}
    return StoredState(model.layout, stored, TransformedState(transform.symmetry, state, elements))


def fold_stored(path: Path, symmetry: Symmetry, state: State) -> State:
    """Return the state of the model at a path in the parametrisation on which a symmetry acts.

    Raises:
        ModelError: a norm cannot be folded.
    """
    try:
        return fold_state(symmetry, state)
    except SymmetryError as error:
        raise ModelError(f"{path}: {error}") from error
