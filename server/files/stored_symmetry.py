"""The symmetry of a stored model: given by hand, or discovered by executing the architecture that its config names.

The symmetry comes from the first source that exists: a file in the notation, a config, the `symmetry` in the metadata
of the model's file, the config.json of its folder. One function derives it for every command.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fedbasin.server.files.library.executable_model import ExecutableModel, from_factory, from_folder
from fedbasin.server.files.library.tensor_layout import ModuleState, StoredState, TensorLayout, identity_layout
from fedbasin.server.files.reading import CONFIG, ModelError, StoredModel, few, read_json
from fedbasin.server.files.symmetry_cache import SymmetryCache
from fedbasin.strategies.symmetry.discover.discovery import NOT_READ, Discovery, discover
from fedbasin.strategies.symmetry.discover.rotation import rotate_residual
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError, parse
from fedbasin.strategies.tensors.state import State

# The key of a file's metadata that holds a notation.
METADATA = "symmetry"

# The dtypes in which a group element can act; narrower ones have their scales in other tensors.
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Source:
    """The user's statements on a model's symmetry.

    Attributes:
        notation: a file in the notation.
        config: a config.json that names the architecture.
        module: a function `package.module:function` that returns the module and its example.
        rotate_residual: let the residual stream rotate, which folds the norms into the layers that read it.
    """

    notation: Path | None = None
    config: Path | None = None
    module: str | None = None
    rotate_residual: bool = False


@dataclass(frozen=True, eq=False)
class SymmetricModel:
    """A stored model with its symmetry.

    Attributes:
        stored: the stored tensors.
        symmetry: the symmetry, in the names of the module; in those of the files if it was given by hand.
        layout: where the tensors that the symmetry names are stored.
        executable: the module, if the model can be executed.
        by_hand: True if the user wrote the symmetry.
        source: what the user said of the symmetry.
        stops: one sentence for each part that does not move.
    """

    stored: StoredModel
    symmetry: Symmetry
    layout: TensorLayout
    executable: ExecutableModel | None
    by_hand: bool
    source: Source = Source()
    stops: tuple[str, ...] = ()

    @property
    def state(self) -> State:
        """The tensors in the names of the symmetry."""
        return ModuleState(self.layout, self.stored)

    def to_stored(self, state: State, original: State | None = None) -> State:
        """Return the stored tensors of a state in the names of the symmetry, with all that it does not read."""
        return StoredState(self.layout, self.stored if original is None else original, state)


def symmetric_model(
    model: StoredModel, source: Source | None = None, progress: Callable[[str, float], None] | None = None
) -> SymmetricModel:
    """Return a stored model with its symmetry, once it is known to fit the model's tensors.

    Args:
        model: the stored model.
        source: what the user says of the symmetry.
        progress: called while the symmetry is discovered.

    Raises:
        ModelError: no source gives a symmetry, or it does not fit the model's tensors.
    """
    source = source or Source()
    try:
        notation = _notation(model, source)
        if notation is not None:
            return _by_hand(model, notation, source)
        return derived(model, executable_of(model, source), source, progress)
    except SymmetryError as error:
        raise ModelError(f"{model.path}: {error}") from error


def model_of_symmetry(
    model: StoredModel, stored: Symmetry | None, module: Symmetry | None, source: Source
) -> SymmetricModel:
    """Return a stored model with a symmetry that is known, such as that of a saved transform.

    Args:
        model: the stored model.
        stored: the symmetry in the names of files, if there is one.
        module: the symmetry in the names of the module, if it is known.
        source: what the user says of the architecture.

    Raises:
        ModelError: the symmetry does not fit the model's tensors.
    """
    can_build = source.module is not None or source.config is not None or "model_type" in model.config
    try:
        if module is not None and can_build:
            executable = executable_of(model, source)
            symmetric = SymmetricModel(model, module, executable.layout, executable, by_hand=False, source=source)
            module.check({name: tensor.to("meta") for name, tensor in symmetric.state.items()})
            return symmetric
        if stored is None:
            raise ModelError(f"{model.path}: its architecture must be known; give --config {CONFIG} or --module")
        return _by_hand(model, stored, source)
    except SymmetryError as error:
        raise ModelError(f"{model.path}: {error}") from error


def choose_spaces(
    symmetry: Symmetry, globs: Sequence[str] = (), first: int | None = None, last: int | None = None
) -> Symmetry:
    """Return the part of a symmetry with some of its spaces, which is a symmetry too.

    Args:
        symmetry: the whole symmetry.
        globs: patterns, of which a space's name must fit one; none choose every name.
        first: number of blocks from the input on whose spaces are chosen.
        last: number of blocks from the output on whose spaces are chosen; with `first`, both ends are.

    Raises:
        ModelError: no space is left.
    """
    blocks = sorted({block for space in symmetry.spaces if (block := _block(space)) is not None})
    ends = {*blocks[: first or 0], *(blocks[-last:] if last else [])}
    spaces = tuple(
        space
        for space in symmetry.spaces
        if (not globs or any(fnmatchcase(space.name, glob) for glob in globs))
        and ((first is None and last is None) or _block(space) in ends)
    )
    if not spaces:
        names = [space.name for space in symmetry.spaces]
        there = (
            f"there are {few(names)}" if names else "the symmetry has none, for which `fedbasin inspect` has reasons"
        )
        raise ModelError(f"no space is chosen by {few(globs) or 'these options'}; {there}")
    return replace(symmetry, spaces=spaces)


def in_stored_names(symmetry: Symmetry, layout: TensorLayout) -> Symmetry | None:
    """Return a symmetry of a module in the names of its files, or None if a tensor is stored in pieces.

    Two names of one stored tensor become one axis.
    """
    names = {name: pieces[0].stored for name, pieces in layout.pieces.items()}
    touched = [axis.tensor for space in symmetry.spaces for axis in space.axes]
    touched += [name for shift in symmetry.shifts for name in shift.tensors]
    touched += [name for fold in symmetry.folds for name in (fold.weight, *(reader.tensor for reader in fold.readers))]
    if not all(name in names and names[name] in layout.whole for name in touched):
        return None
    return _rename_tensors(symmetry, names)


def in_module_names(symmetry: Symmetry, layout: TensorLayout) -> Symmetry:
    """Return a symmetry of files in the names of the module that loads them.

    The axes of a tensor that the module has under several names are repeated for each of them.
    """
    spaces = tuple(
        replace(
            space,
            axes=tuple(
                replace(axis, tensor=name) for axis in space.axes for name in _module_names(layout, axis.tensor)
            ),
        )
        for space in symmetry.spaces
    )
    return replace(_rename_tensors(symmetry, layout.whole), spaces=spaces)


def _module_names(layout: TensorLayout, stored: str) -> Iterable[str]:
    return dict.fromkeys(name for name, _ in layout.readers.get(stored, ())) if stored in layout.whole else (stored,)


def _notation(model: StoredModel, source: Source) -> Symmetry | None:
    """Return the symmetry that was written by hand, if there is one."""
    if source.notation is not None and source.config is not None:
        raise ModelError("--symmetry and --config both define the symmetry; give one")
    is_written = source.notation is not None or (source.config is None and METADATA in model.metadata)
    if source.rotate_residual and is_written:
        raise ModelError(
            f"{model.path}: --rotate-residual executes the model, but the symmetry is in the notation, which has its "
            "own folds; give --config or --module instead, or leave the option out"
        )
    if source.notation is not None:
        return _parse_file(source.notation)
    return parse(model.metadata[METADATA]) if is_written else None


def _parse_file(notation: Path) -> Symmetry:
    try:
        return parse(notation.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{notation}: cannot be read as a notation: {error}") from error


def _by_hand(model: StoredModel, symmetry: Symmetry, source: Source) -> SymmetricModel:
    shapes = model.shapes()
    symmetry = _drop_tied_axes(symmetry, model.ties)
    symmetry.check(shapes)
    layout = identity_layout(shapes)
    _refuse_narrow_dtypes(model, symmetry, layout)
    is_built = source.module is not None or "architectures" in model.config
    return SymmetricModel(
        model, symmetry, layout, executable_of(model, source) if is_built else None, by_hand=True, source=source
    )


def executable_of(model: StoredModel, source: Source) -> ExecutableModel:
    """Return the module of a stored model, whose symmetry is not needed.

    Raises:
        ModelError: nothing says which module it is, or the weights do not fit it.
    """
    if source.module is not None:
        return from_factory(model, source.module)
    if source.config is None and not model.config:
        raise ModelError(
            f"{model.path}: has no symmetry in its metadata and no {CONFIG}; give --symmetry FILE in the notation, "
            f"--config {CONFIG} of its architecture, or --module"
        )
    where = source.config or model.path / CONFIG
    config = model.config if source.config is None else read_json(source.config)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{where}: has no model_type; give the model's own config, or --symmetry FILE")
    return from_folder(model, config, where)


def derived(
    model: StoredModel,
    executable: ExecutableModel,
    source: Source,
    progress: Callable[[str, float], None] | None = None,
) -> SymmetricModel:
    """Return a stored model with the symmetry that is discovered by executing it.

    Args:
        model: the stored model.
        executable: its module.
        source: what the user says of the symmetry.
        progress: called while the symmetry is discovered.

    Raises:
        SymmetryError: the module does not run, cannot be followed, or has no residual stream that rotates as asked.
        ModelError: a tensor has too narrow a dtype.
    """
    module, layout, example = executable.module, executable.layout, executable.example
    discovery = discover(module, example, cache=SymmetryCache(), progress=progress)
    symmetry, stays = _storable(discovery.symmetry, layout)
    symmetry, untouched = _apart_from_idle(symmetry, _idle(discovery, executable))
    if source.rotate_residual:
        symmetry = rotate_residual(module, symmetry, example)
        _refuse_tied_head(model, executable, symmetry)
    _refuse_narrow_dtypes(model, symmetry, layout)
    stops = (*map(str, discovery.stops), *stays, *untouched)
    return SymmetricModel(model, symmetry, layout, executable, by_hand=False, source=source, stops=stops)


def _refuse_tied_head(model: StoredModel, executable: ExecutableModel, symmetry: Symmetry) -> None:
    # A file may hold two copies of a table that the config ties, of which a fold changes one: loaders differ in which
    # of them they read.
    module: Any = executable.module
    if getattr(executable.config, "tie_word_embeddings", False) and (head := module.get_output_embeddings()):
        state = module.state_dict(keep_vars=True)
        if any(state[reader.tensor] is head.weight for fold in symmetry.folds for reader in fold.readers):
            raise ModelError(
                f"{model.path}: --rotate-residual folds the last norm into the head, which this config ties to the token "
                "table; untie them (tie_word_embeddings = False), or leave the option out"
            )


def _storable(symmetry: Symmetry, layout: TensorLayout) -> tuple[Symmetry, tuple[str, ...]]:
    """Return the spaces whose tensors are all stored, and a sentence for each other one.

    What a file lacks, such as a new head, is random in the module: nothing can move it.
    """
    lacking = {
        space.name: name
        for space in symmetry.spaces
        for axis in space.axes
        if (name := axis.tensor) not in layout.pieces
    }
    shifts = tuple(shift for shift in symmetry.shifts if all(name in layout.pieces for name in shift.tensors))
    spaces = tuple(space for space in symmetry.spaces if space.name not in lacking)
    return replace(symmetry, spaces=spaces, shifts=shifts), tuple(
        f"the files lack {tensor!r}, which fixes the units of {space!r}" for space, tensor in lacking.items()
    )


def _idle(discovery: Discovery, executable: ExecutableModel) -> dict[str, torch.Size]:
    """Return the shapes of the stored weights that the example does not run, such as those of a tower for images."""
    unread = {stop.part for stop in discovery.stops if stop.operation == NOT_READ}
    parameters = executable.module.named_parameters(remove_duplicate=False)
    return {
        name: tensor.shape
        for name, tensor in parameters
        # Vectors stand for masked entries in training, or belong to a layer that has a matrix too.
        if name in unread and name in executable.layout.pieces and sum(length > 1 for length in tensor.shape) > 1
    }


def _apart_from_idle(symmetry: Symmetry, idle: Mapping[str, torch.Size]) -> tuple[Symmetry, tuple[str, ...]]:
    """Return the spaces that no weight can touch which the example does not run, and a sentence for each other one.

    Nothing shows what such a weight reads or writes. What has none of its lengths it does not touch.
    """
    touching = {
        space.name: name
        for space in symmetry.spaces
        for name, shape in idle.items()
        if set(shape) & {space.group.count, *space.group.sizes, *map(space.width, range(len(space.group.sizes)))} - {1}
    }
    spaces = tuple(space for space in symmetry.spaces if space.name not in touching)
    return replace(symmetry, spaces=spaces), tuple(
        f"{tensor!r}, which the example of the inputs does not run, may touch the units of {space!r}"
        for space, tensor in touching.items()
    )


def _refuse_narrow_dtypes(model: StoredModel, symmetry: Symmetry, layout: TensorLayout) -> None:
    shapes = model.shapes()
    for space in symmetry.spaces:
        for axis in space.axes:
            for piece in layout.pieces.get(axis.tensor, ()):
                if (dtype := shapes[piece.stored].dtype) not in _DTYPES:
                    raise ModelError(
                        f"{model.path}: {piece.stored!r} of space {space.name!r} is {dtype}, which cannot be "
                        "transformed; convert the model to bfloat16 or float32"
                    )


def _rename_tensors(symmetry: Symmetry, names: Mapping[str, str]) -> Symmetry:
    """Return a symmetry with other names for tensors and layers; two names of one tensor become one axis."""
    layers = {old.removesuffix(".weight"): new.removesuffix(".weight") for old, new in names.items()}
    words = layers | dict(names)
    # Renamed in the notation, because folds name layers as well as tensors; a space keeps its name.
    spaces = tuple(
        replace(
            space,
            axes=tuple(dict.fromkeys(replace(axis, tensor=names.get(axis.tensor, axis.tensor)) for axis in space.axes)),
        )
        for space in symmetry.spaces
    )
    rest = str(replace(symmetry, spaces=()))
    renamed = parse(re.sub(r"[^\s\[\]()]+", lambda m: words.get(m[0], m[0]), rest))
    return replace(renamed, spaces=spaces)


def _drop_tied_axes(symmetry: Symmetry, ties: Mapping[str, str]) -> Symmetry:
    """Return a symmetry without the axes of names whose tensor is stored under another.

    Raises:
        SymmetryError: the two names of a tensor have different axes.
    """
    for name, stored in ties.items():
        axes = _axes_of(symmetry, name)
        if axes and axes != _axes_of(symmetry, stored):
            raise SymmetryError(
                f"{name!r} and {stored!r} are one tensor, which the symmetry would move in two ways; give both names "
                "the same axes"
            )
    spaces = tuple(
        replace(space, axes=tuple(axis for axis in space.axes if axis.tensor not in ties)) for space in symmetry.spaces
    )
    return replace(symmetry, spaces=spaces)


def _axes_of(symmetry: Symmetry, tensor: str) -> set[tuple[str, Axis]]:
    """Return the axes of a tensor with the names of their spaces, comparable between tensors."""
    return {
        (space.name, replace(axis, tensor="", scored=True))
        for space in symmetry.spaces
        for axis in space.axes
        if axis.tensor == tensor
    }


def _block(space: Space) -> int | None:
    number = re.search(r"\d+", space.name)
    return int(number[0]) if number else None
