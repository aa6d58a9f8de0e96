"""A transform in a file: what each moved space does, as tensors, and the notation in the metadata.

residual.order    block order[i] becomes block i       int64 [count]
heads.0.order
heads.0.role.1     the maps of a role, if it has any     [count, size, size]
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

# Tells a file of ours from a model that carries its notation.
_KIND = "fedbasin.transform"


def save(transform: Transform, target: Path) -> None:
    """Write a transform in place of what is there, in one step.

    Raises:
        ModelError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, element in transform.elements.items():
        tensors[f"{name}.order"] = element.order.contiguous()
        roles = enumerate(element.blocks)
        tensors |= {f"{name}.role.{role}": b.contiguous() for role, b in roles if b is not None}
    part = target.with_name(f".{target.name}.part")
    try:
        save_file(tensors, part, {"kind": _KIND, METADATA: str(transform.symmetry)})
        part.replace(target)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{target}: cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> Transform:
    """Read a transform.

    Raises:
        ModelError: the file is none, or an element does not fit its space.
    """
    stored = open_model(path)
    if stored.metadata.get("kind") != _KIND:
        raise ModelError(f"{path}: is no transform; `fedbasin align --transform FILE` writes one")
    try:
        symmetry = parse(stored.metadata[METADATA])
    except (KeyError, SymmetryError) as error:
        raise ModelError(f"{path}: its notation cannot be read: {error}") from error
    return Transform(
        symmetry, {space.name: _element(path, space, stored) for space in symmetry.spaces}
    )


def _element(path: Path, space: Space, stored: Mapping[str, Tensor]) -> Element:
    group = space.group
    order = stored.get(f"{space.name}.order", torch.empty(0))
    if not torch.equal(order.sort().values, torch.arange(group.count)):
        raise ModelError(f"{path}: {space.name}.order is no order of {group.count} blocks")
    blocks = []
    for role, size in enumerate(group.sizes):
        block = stored.get(f"{space.name}.role.{role}")
        if block is not None and block.shape != (group.count, size, size):
            raise ModelError(
                f"{path}: {space.name}.role.{role} has shape {tuple(block.shape)}, and {group} needs "
                f"{(group.count, size, size)}"
            )
        blocks.append(block)
    return replace(group.identity(), order=order, blocks=tuple(blocks))
