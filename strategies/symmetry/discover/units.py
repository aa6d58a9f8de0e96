"""Units: the features along an axis of a value, as a tree that is refined while a model is followed.

A layer writes units whose structure is not known yet. A reshape into heads refines them to a *product* of two sets of
units, the heads and the entries of a head; a split refines them to a *sum*, such as query, key and value of a fused
projection. Sums and products of values unite the units of their axes, which refines both to their common structure.
Units that must keep their places are *fixed*, and *bent* units are scaled or curved one by one, so that they may be
permuted but not rotated.

A reshape may also stack query, key and value along an axis of their own. The axis inside is then a *family*: one set of
units for each place along that axis, until an operator takes the places apart or treats them alike.

An *axis* is a list of units, outermost first, whose sizes multiply to the length of the axis.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

_T = TypeVar("_T")

_numbers = itertools.count()


@dataclass(eq=False)
class Units:
    """A set of features, until it is united with another.

    Attributes:
        size: number of features.
        name: name of the module or tensor that first writes them, or "".
        fixed: True if they must keep their places.
        bent: True if entries are scaled or curved one by one.
        averaged: True if their mean is taken, which rotations must then keep.
        reason: the operation that fixed them and its line in the model's source; empty for inputs and outputs.
        outer: True if they number the matrices of a batched product, so that what is inside may depend on them.
        kind: how the parts make up the units, if they are refined.
        parts: the parts of refined units.
        parent: the units with which these were united, or None.
        united: True if other units were united with these.
        whole: the product of which these are the outer factor, if they came from one.
        index: for a family the units that number its members.
        number: order of creation.
    """

    size: int
    name: str = ""
    fixed: bool = False
    bent: bool = False
    averaged: bool = False
    reason: tuple[str, str] = ("", "")
    outer: bool = False
    kind: Literal["", "product", "sum", "family"] = ""
    parts: "tuple[Units, ...]" = ()
    parent: "Units | None" = None
    united: bool = False
    whole: "Units | None" = None
    index: "Units | None" = None
    number: int = field(default_factory=lambda: next(_numbers))

    def root(self) -> "Units":
        """Return the units that stand for all that are united with these."""
        units = self
        while units.parent is not None:
            units = units.parent
        return units

    def leaves(self) -> Iterator["Units"]:
        """Yield the finest parts, in order."""
        root = self.root()
        if not root.kind:
            yield root
        for part in root.parts:
            yield from part.leaves()

    def part(self, size: int) -> "Units":
        """Return new units with all that is known of these, to become a part of them."""
        return replace(self, size=size, kind="", parts=(), parent=None, united=False, whole=None)

    def copy(self) -> "Units":
        """Return new units of the same structure."""
        return replace(self, parts=tuple(part.copy() for part in self.parts))

    @property
    def is_untouched(self) -> bool:
        """True if nothing is known of the units but their structure."""
        marks = self.fixed or self.bent or self.averaged or self.outer or self.united or self.parent is not None
        return not marks and all(part.is_untouched for part in self.parts)

    @property
    def is_fixed(self) -> bool:
        """True if every part keeps its place."""
        return all(leaf.fixed for leaf in self.leaves())


Axis = Sequence[Units]


def fixed(length: int) -> list[Units]:
    """Return an axis of units that keep their places."""
    return [] if length == 1 else [Units(length, fixed=True)]


def fresh(length: int, name: str = "") -> list[Units]:
    """Return an axis of units of which nothing is known yet."""
    return [] if length == 1 else [Units(length, name)]


def leaves(axis: Axis) -> Iterator[Units]:
    """Yield the finest units along an axis."""
    for units in axis:
        yield from units.leaves()


def length(axis: Axis) -> int:
    """Return the number of entries of an axis."""
    return math.prod(units.size for units in axis)


def beside(axes: Sequence[_T], dim: int) -> list[_T]:
    """Return all axes but one."""
    return [*axes[:dim], *axes[dim + 1 :]]


def factors(axis: Axis) -> list[Units]:
    """Return the units along an axis with all products multiplied out."""
    result: list[Units] = []
    for units in axis:
        root = units.root()
        result += factors(root.parts) if root.kind == "product" else [root]
    return result


def concatenation(axes: Sequence[Axis]) -> list[Units]:
    """Return the axis of a concatenation."""
    present = [axis for axis in axes if length(axis)]
    if len(present) == 1:
        return list(present[0])
    return [Units(sum(map(length, present)), kind="sum", parts=tuple(_single(axis) for axis in present))]


def _single(axis: Axis) -> Units:
    if not axis:
        return Units(1, fixed=True)
    return axis[0] if len(axis) == 1 else Units(length(axis), kind="product", parts=tuple(axis))
