"""Alignment of one stored model to another, and the application of a saved transform."""

from collections.abc import Callable, Iterator, Mapping

from rich.console import Group
from rich.table import Column, Table
from torch import Tensor

from fedbasin.proto.report import AlignmentReport
from fedbasin.server.files.reading import ModelError, StoredModel, few
from fedbasin.server.report.charts.text import number
from fedbasin.strategies.alignment.identity_bound import identity_bounds
from fedbasin.strategies.alignment.transformed_state import TransformedState
from fedbasin.strategies.alignment.weight_matching import MatchResult, find_by_weights, fold_state
from fedbasin.strategies.symmetry.folding import FoldError
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.parallel import is_finite, one_core
from fedbasin.strategies.tensors.state import State

# Keys of a config that record how its file was written: models of one architecture may differ in them.
_PROVENANCE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


def align(
    anchor: StoredModel, model: StoredModel, symmetry: Symmetry, on_read: Callable[[str], None], *, certify: bool
) -> MatchResult:
    """Find the transform that takes `model` into the basin of `anchor`.

    Args:
        anchor: the model that stays as it is.
        model: the model that the transform is for.
        symmetry: the symmetry of both models.
        on_read: called with the name of each tensor of `model` that the search reads.
        certify: prove first at which spaces the identity is optimal; costs memory.

    Raises:
        ModelError: an entry is infinite or not a number, or a norm cannot be folded.
    """
    states: list[State] = []
    for stored, state in ((anchor, anchor), (model, _WatchedState(model, on_read))):
        _refuse_not_finite(stored)
        try:
            states.append(fold_state(symmetry, state))
        except FoldError as error:
            raise ModelError(f"{stored.path}: {error}") from error
    anchor_state, model_state = states
    bounds = identity_bounds(symmetry, anchor_state) if certify else None
    return find_by_weights(symmetry, anchor_state, model_state, bounds)


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


def require_equal_shapes(anchor: StoredModel, model: StoredModel) -> None:
    """Refuse two models that do not have the same tensors.

    Raises:
        ModelError: names the tensors that differ in name or shape.
    """
    for holder, lacking in ((anchor, model), (model, anchor)):
        if missing := [name for name in holder if name not in lacking.files]:
            raise ModelError(
                f"{lacking.path} has no tensor {few(missing)}, but {holder.path} has; align only models of one "
                "architecture that were saved in the same way"
            )
    shapes = model.shapes()
    differ = [
        f"{name} {tuple(shapes[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in anchor.shapes().items()
        if shapes[name].shape != tensor.shape
    ]
    if differ:
        raise ModelError(
            f"{model.path} has other shapes than {anchor.path}: {few(differ)}; align only models of one architecture"
        )


def require_equal_symmetries(
    anchor: StoredModel, model: StoredModel, anchor_symmetry: Symmetry, model_symmetry: Symmetry
) -> None:
    """Refuse two models whose configs give different symmetries.

    Raises:
        ModelError: names the keys in which the configs differ.
    """
    if anchor_symmetry == model_symmetry:
        return
    keys = (anchor.config.keys() | model.config.keys()) - _PROVENANCE
    differ = sorted(key for key in keys if anchor.config.get(key) != model.config.get(key))
    # Equal configs may still differ in tensors, such as a head that one file leaves out.
    where = f"configs differ in {few(differ)}" if differ else "files hold different tensors"
    raise ModelError(
        f"{model.path} and {anchor.path} are of two architectures: their {where}; align only models of one architecture"
    )


def apply_transform(transform: Transform, model: StoredModel) -> State:
    """Return the state of a stored model in which each tensor is transformed when it is read.

    Raises:
        ModelError: the transform was made for another model.
    """
    symmetry = transform.symmetry
    try:
        symmetry.check(model.shapes())
        state = fold_state(symmetry, model)
    except (SymmetryError, FoldError) as error:
        raise ModelError(f"{model.path}: {error}") from error
    # Without identity elements, tensors that stay are written byte for byte.
    elements = {name: e for name, e in transform.elements.items() if not e.is_identity}
    return TransformedState(symmetry, state, elements)


def render_alignment(report: AlignmentReport) -> Group:
    """Return the report of an alignment as a table with a line on the distances below it."""
    numbers = (Column(name, justify="right") for name in ("moved", "gain"))
    table = Table(Column("space", overflow="fold"), *numbers, "certified", box=None, pad_edge=False)
    for space in report.spaces:
        certified = "yes" if space.certified else ""
        table.add_row(space.space, number(space.moved), number(space.gain), certified)
    distances = f"{report.distance_before:.6g} → {report.distance_after:.6g}"
    sweeps = "1 sweep" if report.sweeps == 1 else f"{report.sweeps} sweeps"
    return Group(table, "", f"distance to the anchor {distances} in {sweeps}")


def _refuse_not_finite(model: StoredModel) -> None:
    with one_core():
        for name in model:
            if not is_finite(model[name]):
                raise ModelError(
                    f"{model.path}: {name!r} has entries that are infinite or not a number; it cannot be aligned"
                )
