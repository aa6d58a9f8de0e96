"""Measure the fraction of a model's parameters that a symmetry can move."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fedbasin.strategies.symmetry.groups.groups import Group
from fedbasin.strategies.symmetry.symmetry import Axis, Symmetry
from fedbasin.strategies.tensors.state import State, floating


@dataclass(frozen=True)
class Coverage:
    """The parameters of a model that some space of a symmetry touches.

    Attributes:
        fraction: fraction of the floating entries of the state that some space touches, 0 to 1.
        by_kind: the same fraction for each kind of group, such as "S" or "O*O wr S". An entry that two kinds touch,
            such as a weight between two spaces, counts for both.
        uncovered: names of the floating tensors that no space touches.
    """

    fraction: float
    by_kind: Mapping[str, float]
    uncovered: tuple[str, ...]


def coverage(symmetry: Symmetry, state: State) -> Coverage:
    """Measure the coverage of a symmetry; only names and shapes of the state are read.

    Args:
        symmetry: the symmetry of the model.
        state: all tensors of the model, or its parameters alone. A tensor counts under each of its names.
    """
    # Counters and indices are no parameters.
    tensors = floating(state)
    total = max(sum(tensor.numel() for tensor in tensors.values()), 1)
    axes: dict[str, list[Axis]] = {}
    for space in symmetry.spaces:
        axes.setdefault(kind_of(space.group), []).extend(space.axes)
    touched = touched_entries((axis for group in axes.values() for axis in group), tensors)
    return Coverage(
        fraction=sum(touched.values()) / total,
        by_kind={kind: sum(touched_entries(group, tensors).values()) / total for kind, group in axes.items()},
        uncovered=tuple(name for name in tensors if name not in touched),
    )


def kind_of(group: Group) -> str:
    """Return the notation of a group without its numbers: "S", "O", "O*O wr S", "(R*O)xS wr S"."""
    return re.sub(r"\([\d,]+\)|\^\d+", "", str(group))


def touched_entries(axes: Iterable[Axis], state: State) -> dict[str, int]:
    """Return for every tensor of the state that some axis touches the number of its entries that are touched."""
    by_tensor: dict[str, list[Axis]] = {}
    for axis in axes:
        if axis.tensor in state:
            by_tensor.setdefault(axis.tensor, []).append(axis)
    return {name: _entries(group, tuple(state[name].shape)) for name, group in by_tensor.items()}


def _entries(axes: list[Axis], shape: tuple[int, ...]) -> int:
    # Only dimensions of which parts are touched are kept, so the mask of a large matrix is a vector as a rule.
    dims = {axis.dim for axis in axes if axis.part is not None}
    mask = torch.zeros([n if dim in dims else 1 for dim, n in enumerate(shape)], dtype=torch.bool)
    for axis in axes:
        axis.view(mask).fill_(True)
    return int(mask.sum()) * math.prod(shape) // max(mask.numel(), 1)
