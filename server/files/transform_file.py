"""Transforms in files: the element of each space as tensors, and the notation in the metadata.

residual.order    block order[i] becomes block i      int64 [count]
heads.0.order
heads.0.role.1    the matrices of a role, if any      [count, size, size]
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedbasin.server.files.reading import ModelError, open_model
from fedbasin.server.files.stored_symmetry import METADATA
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, SymmetryError, parse
from fedbasin.strategies.symmetry.transform import Transform

# In the metadata, because a model may carry its notation too.
_KIND = "fedbasin.transform"


def save(transform: Transform, target: Path) -> None:
    """Write a transform to a file, and replace an existing one in one step.

    Raises:
        ModelError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, element in transform.elements.items():
        tensors[f"{name}.order"] = element.order.contiguous()
        for role, block in enumerate(element.blocks):
            if block is not None:
                tensors[f"{name}.role.{role}"] = block.contiguous()
    part = target.with_name(f".{target.name}.part")
    try:
        save_file(tensors, part, {"kind": _KIND, METADATA: str(transform.symmetry)})
        part.replace(target)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{target}: cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> Transform:
    """Read a transform from a file.

    Raises:
        ModelError: the file is not a transform, or an element does not fit its space.
    """
    stored = open_model(path)
    if stored.metadata.get("kind") != _KIND:
        raise ModelError(f"{path}: is not a transform; write one with `fedbasin align --transform FILE`")
    try:
        symmetry = parse(stored.metadata[METADATA])
    except (KeyError, SymmetryError) as error:
        raise ModelError(f"{path}: its notation cannot be read: {error}") from error
    elements = {space.name: _read_element(path, space, stored) for space in symmetry.spaces}
    return Transform(symmetry, elements)


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
