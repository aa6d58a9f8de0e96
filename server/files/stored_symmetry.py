"""Where a stored model's symmetry comes from, and which of its spaces are meant.

The first of these that there is: a file in the notation, a config that names a family, the `symmetry` in the
metadata of the model's file, the config.json of its folder.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fedbasin.server.files.published_names import library_names
from fedbasin.server.files.reading import CONFIG, ModelError, StoredModel, few, read_json
from fedbasin.strategies.symmetry.models.families import family
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError, parse
from fedbasin.strategies.tensors.state import State

# The key of a file's metadata that holds a notation.
METADATA = "symmetry"

# In these a group element can act; narrower ones are stores of numbers with scales elsewhere.
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def symmetry_of(
    model: StoredModel,
    notation: Path | None = None,
    config: Path | None = None,
    state: State | None = None,
) -> Symmetry:
    """The symmetry of a stored model, which fits it.

    Args:
        model: the stored model.
        notation: a file in the notation.
        config: a file that names a family.
        state: what the model's tensors are when it is loaded, where their names are asked for.

    Raises:
        ModelError: there is none to be had, or it does not fit the model's tensors.
    """
    shapes = model.shapes() if state is None else state
    try:
        found = _without_ties(_source(model, shapes, notation, config), model.ties)
        found.check(shapes)
    except SymmetryError as error:
        raise ModelError(f"{model.path}: {error}") from error
    _refuse_narrow(model.path, found, shapes)
    return found


def chosen(
    symmetry: Symmetry, globs: Sequence[str] = (), first: int | None = None, last: int | None = None
) -> Symmetry:
    """The spaces whose name fits one of `globs` (all without any), of the first or the last blocks.

    Every space is a symmetry of its own, so any choice of them is one.

    Raises:
        ModelError: no space is left.
    """
    blocks = sorted({block for space in symmetry.spaces if (block := _block(space)) is not None})
    meant = {*blocks[: first or 0], *(blocks[-last:] if last else [])}
    spaces = tuple(
        space
        for space in symmetry.spaces
        if (not globs or any(fnmatchcase(space.name, glob) for glob in globs))
        and ((first is None and last is None) or _block(space) in meant)
    )
    if not spaces:
        names = [space.name for space in symmetry.spaces]
        there = f"there are {few(names)}" if names else "the symmetry has none"
        raise ModelError(f"no space is meant by {few(list(globs)) or 'that'}; {there}")
    return replace(symmetry, spaces=spaces)


def spread(symmetry: Symmetry, tied: Mapping[str, str]) -> Symmetry:
    """The symmetry with an axis for every name of a tied tensor.

    Args:
        symmetry: names some of them.
        tied: for each name the first name of its tensor.
    """
    twins: dict[str, list[str]] = {}
    for name, first in tied.items():
        twins.setdefault(first, []).append(name)
    return replace(symmetry, spaces=tuple(_spread(space, tied, twins) for space in symmetry.spaces))


def _spread(space: Space, tied: Mapping[str, str], twins: Mapping[str, list[str]]) -> Space:
    named = (
        replace(axis, tensor=name)
        for axis in space.axes
        for name in twins.get(tied.get(axis.tensor, ""), [axis.tensor])
    )
    return replace(space, axes=tuple(dict.fromkeys(named)))


def _source(
    model: StoredModel, shapes: State, notation: Path | None, config: Path | None
) -> Symmetry:
    if notation is not None and config is not None:
        raise ModelError("--symmetry and --config both say what the symmetry is; give one")
    if notation is not None:
        return parse(_text(notation))
    if config is not None:
        return _of_family(config, read_json(config), shapes)
    if METADATA in model.metadata:
        return parse(model.metadata[METADATA])
    if model.config:
        return _of_family(model.path / CONFIG, model.config, shapes)
    raise ModelError(
        f"{model.path}: nothing says what its symmetry is; give --symmetry FILE in the notation, or "
        f"--config {CONFIG} of a known family"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read as a notation: {error}") from error


def _of_family(path: Path, config: Mapping[str, Any], shapes: State) -> Symmetry:
    if not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{path}: has no model_type; give the model's own config, or --symmetry FILE"
        )
    names = library_names(config, shapes)
    known = {library: shapes[stored] for library, stored in names.items()}
    return _renamed(family(config["model_type"], config, known), names)


def _renamed(symmetry: Symmetry, names: Mapping[str, str]) -> Symmetry:
    """With other names for tensors and layers; two names of one tensor become one axis."""
    layers = {
        library.removesuffix(".weight"): stored.removesuffix(".weight")
        for library, stored in names.items()
    }
    words = layers | dict(names)
    found = parse(re.sub(r"[^\s\[\]()]+", lambda m: words.get(m[0], m[0]), str(symmetry)))
    spaces = (replace(space, axes=tuple(dict.fromkeys(space.axes))) for space in found.spaces)
    return replace(found, spaces=tuple(spaces))


def _without_ties(symmetry: Symmetry, ties: Mapping[str, str]) -> Symmetry:
    """Without the axes of names that are stored under another, which must move alike."""
    for name, kept in ties.items():
        moves = _moves(symmetry, name)
        if moves and moves != _moves(symmetry, kept):
            raise SymmetryError(
                f"{name!r} and {kept!r} are one tensor, which the symmetry would move in two ways"
            )
    spaces = tuple(
        replace(space, axes=tuple(m for m in space.axes if m.tensor not in ties))
        for space in symmetry.spaces
    )
    return replace(symmetry, spaces=spaces)


def _moves(symmetry: Symmetry, tensor: str) -> set[tuple[str, Axis]]:
    return {
        (space.name, replace(axis, tensor="", scored=True))
        for space in symmetry.spaces
        for axis in space.axes
        if axis.tensor == tensor
    }


def _refuse_narrow(path: Path, symmetry: Symmetry, shapes: State) -> None:
    for space in symmetry.spaces:
        for axis in space.axes:
            if shapes[axis.tensor].dtype not in _DTYPES:
                raise ModelError(
                    f"{path}: {axis.tensor!r} of space {space.name!r} is {shapes[axis.tensor].dtype}, in which "
                    "nothing can be turned; convert the model to bfloat16 or float32"
                )


def _block(space: Space) -> int | None:
    number = re.search(r"\d+", space.name)
    return int(number[0]) if number else None
