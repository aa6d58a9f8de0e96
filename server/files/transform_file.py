"""Transforms in files: the element of each space as tensors, and the notation in the metadata.

residual.order    block order[i] becomes block i      int64 [count]
heads.0.order
heads.0.role.1    the matrices of a role, if any      [count, size, size]

The notation names the tensors of the model's files where each is stored whole, so that it fits other files of this
layout. The names of the module are kept beside it, for files in which the same model is stored otherwise.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedbasin.server.files.reading import ModelError, StoredModel, open_model
from fedbasin.server.files.stored_symmetry import METADATA, Source, SymmetricModel, in_stored_names, model_of_symmetry
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry, SymmetryError, parse
from fedbasin.strategies.symmetry.transform import Transform

# In the metadata, because a model may carry its notation too.
_KIND = "fedbasin.transform"

# The key of the notation in the names of the module.
_MODULE = "symmetry_of_module"


def save(transform: Transform, model: SymmetricModel, target: Path) -> None:
    """Write a transform to a file, and replace an existing one in one step.

    Args:
        transform: the transform, in the names of the model's symmetry.
        model: the model that it was found for.
        target: path of the file.

    Raises:
        ModelError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, element in transform.elements.items():
        tensors[f"{name}.order"] = element.order.contiguous()
        for role, block in enumerate(element.blocks):
            if block is not None:
                tensors[f"{name}.role.{role}"] = block.contiguous()
    notations = {METADATA: in_stored_names(transform.symmetry, model.layout)}
    if not model.by_hand:
        notations[_MODULE] = transform.symmetry
    metadata = {key: str(symmetry) for key, symmetry in notations.items() if symmetry is not None}
    part = target.with_name(f".{target.name}.part")
    try:
        save_file(tensors, part, {"kind": _KIND, **metadata})
        part.replace(target)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{target}: cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def load(path: Path, model: StoredModel, source: Source) -> tuple[Transform, SymmetricModel]:
    """Read a transform from a file, for a model.

    Args:
        path: path of the file.
        model: the model that it is for.
        source: what the user says of the model's architecture.

    Returns:
        The transform, and the model in the names of its symmetry.

    Raises:
        ModelError: the file is not a transform, an element does not fit its space, or it does not fit the model.
    """
    stored = open_model(path)
    if stored.metadata.get("kind") != _KIND:
        raise ModelError(f"{path}: is not a transform; write one with `fedbasin align --transform FILE`")
    notations = {key: _parse(path, stored.metadata[key]) for key in (METADATA, _MODULE) if key in stored.metadata}
    if not notations:
        raise ModelError(f"{path}: has no notation in its metadata; write the transform again")
    target = model_of_symmetry(model, notations.get(METADATA), notations.get(_MODULE), source)
    elements = {space.name: _read_element(path, space, stored) for space in target.symmetry.spaces}
    return Transform(target.symmetry, elements), target


def _parse(path: Path, notation: str) -> Symmetry:
    try:
        return parse(notation)
    except SymmetryError as error:
        raise ModelError(f"{path}: its notation cannot be read: {error}") from error


def _read_element(path: Path, space: Space, stored: Mapping[str, Tensor]) -> Element:
    group = space.group
    order = stored.get(f"{space.name}.order", torch.empty(0))
    if not torch.equal(order.sort().values, torch.arange(group.count)):
        raise ModelError(
            f"{path}: {space.name}.order is not an order of {group.count} blocks; write the transform again"
        )
    blocks = []
    for role, size in enumerate(group.sizes):
        block = stored.get(f"{space.name}.role.{role}")
        if block is not None and block.shape != (group.count, size, size):
            raise ModelError(
                f"{path}: {space.name}.role.{role} has shape {tuple(block.shape)}, but {group} needs "
                f"{(group.count, size, size)}; write the transform again"
            )
        blocks.append(block)
    return replace(group.identity(), order=order, blocks=tuple(blocks))
