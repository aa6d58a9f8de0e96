"""The symmetry of a stored model, and the choice of some of its spaces.

The symmetry comes from the first source that exists: a file in the notation, a config that names a family, the
`symmetry` in the metadata of the model's file, the config.json of its folder.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fedbasin.server.files.published_names import library_names
from fedbasin.server.files.reading import CONFIG, ModelError, StoredModel, few, read_json
from fedbasin.strategies.symmetry.models.families import family
from fedbasin.strategies.symmetry.models.residual_rotation import rotating_residual_family
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError, parse
from fedbasin.strategies.tensors.state import State

# The key of a file's metadata that holds a notation.
METADATA = "symmetry"

# The dtypes in which a group element can act; narrower ones have their scales in other tensors.
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def symmetry_of(
    model: StoredModel,
    notation: Path | None = None,
    config: Path | None = None,
    state: State | None = None,
    *,
    rotate_residual: bool = False,
) -> Symmetry:
    """Return the symmetry of a stored model, once it is known to fit the model's tensors.

    Args:
        model: the stored model.
        notation: a file in the notation.
        config: a file that names a family.
        state: state of the loaded model, if its names are needed and not those of the files.
        rotate_residual: let the residual stream rotate, which folds the norms of the family into their readers.

    Raises:
        ModelError: no source gives a symmetry, or it does not fit the model's tensors.
    """
    shapes = model.shapes() if state is None else state
    try:
        symmetry = _read_symmetry(model, shapes, notation, config, rotate_residual=rotate_residual)
        symmetry = _drop_tied_axes(symmetry, model.ties)
        symmetry.check(shapes)
    except SymmetryError as error:
        raise ModelError(f"{model.path}: {error}") from error
    for space in symmetry.spaces:
        for axis in space.axes:
            if (dtype := shapes[axis.tensor].dtype) not in _DTYPES:
                raise ModelError(
                    f"{model.path}: {axis.tensor!r} of space {space.name!r} is {dtype}, which cannot be transformed; "
                    "convert the model to bfloat16 or float32"
                )
    return symmetry


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
        there = f"there are {few(names)}" if names else "the symmetry has none"
        raise ModelError(f"no space is chosen by {few(globs) or 'these options'}; {there}")
    return replace(symmetry, spaces=spaces)


def add_tied_axes(symmetry: Symmetry, tied: Mapping[str, str]) -> Symmetry:
    """Return the symmetry with the axes of a tied tensor repeated for each of its names.

    Args:
        symmetry: a symmetry with axes for some of the names.
        tied: for each name the first name of its tensor.
    """
    twins: dict[str, list[str]] = defaultdict(list)
    for name, first_name in tied.items():
        twins[first_name].append(name)
    spaces = []
    for space in symmetry.spaces:
        axes = (
            replace(axis, tensor=name)
            for axis in space.axes
            for name in twins.get(tied.get(axis.tensor, ""), [axis.tensor])
        )
        spaces.append(replace(space, axes=tuple(dict.fromkeys(axes))))
    return replace(symmetry, spaces=tuple(spaces))


def _read_symmetry(
    model: StoredModel, shapes: State, notation: Path | None, config: Path | None, *, rotate_residual: bool
) -> Symmetry:
    if notation is not None and config is not None:
        raise ModelError("--symmetry and --config both define the symmetry; give one")
    if rotate_residual and (notation is not None or (config is None and METADATA in model.metadata)):
        raise ModelError(
            f"{model.path}: --rotate-residual needs the config of a known family, but the symmetry is in the "
            "notation, which has its own folds; give --config instead, or leave the option out"
        )
    if notation is not None:
        return _parse_file(notation)
    if config is not None:
        return _family_symmetry(config, read_json(config), shapes, rotate_residual=rotate_residual)
    if METADATA in model.metadata:
        return parse(model.metadata[METADATA])
    if model.config:
        path = model.path / CONFIG
        return _family_symmetry(path, model.config, shapes, rotate_residual=rotate_residual)
    raise ModelError(
        f"{model.path}: has no symmetry in its metadata and no {CONFIG}; give --symmetry FILE in the notation, or "
        f"--config {CONFIG} of a known family"
    )


def _parse_file(notation: Path) -> Symmetry:
    try:
        return parse(notation.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{notation}: cannot be read as a notation: {error}") from error


def _family_symmetry(path: Path, config: Mapping[str, Any], shapes: State, *, rotate_residual: bool) -> Symmetry:
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}: has no model_type; give the model's own config, or --symmetry FILE")
    names = library_names(config, shapes)
    state = {library: shapes[stored] for library, stored in names.items()}
    make_symmetry = rotating_residual_family if rotate_residual else family
    symmetry = make_symmetry(config["model_type"], config, state)
    # Checked here too, because a file may hold two copies of a tied table, of which a fold would change one.
    if rotate_residual and config.get("tie_word_embeddings"):
        raise ModelError(
            f"{path}: --rotate-residual folds the last norm into the head, which this config ties to the token "
            "table; untie them, or leave the option out"
        )
    return _rename_tensors(symmetry, names)


def _rename_tensors(symmetry: Symmetry, names: Mapping[str, str]) -> Symmetry:
    """Return a symmetry with other names for tensors and layers; two names of one tensor become one axis."""
    layers = {library.removesuffix(".weight"): stored.removesuffix(".weight") for library, stored in names.items()}
    words = layers | dict(names)
    # Renamed in the notation, because folds name layers as well as tensors.
    renamed = parse(re.sub(r"[^\s\[\]()]+", lambda m: words.get(m[0], m[0]), str(symmetry)))
    spaces = (replace(space, axes=tuple(dict.fromkeys(space.axes))) for space in renamed.spaces)
    return replace(renamed, spaces=tuple(spaces))


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
