"""Feature spaces under construction: a union-find that tracing fills and reads its spaces from.

A space is a set of units whose order might be free. Every use of a parameter axis *binds* the axis to a space;
two bindings of one axis make the spaces one, and so do sums and products of features. What cannot be followed
is *fixed*: its units keep their places, and so do those of every space that is ever joined to it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from fedbasin.strategies.symmetry.groups.groups import Group, Permutation, Wreath
from fedbasin.strategies.symmetry.symmetry import Axis, Space
from fedbasin.strategies.symmetry.translation import Shift


@dataclass(eq=False)
class Units:
    """The units that one layer writes, until they turn out to be those of another.

    Attributes:
        name: of the module that writes it first.
        width: number of units.
        groups: normalisation groups that must stay together, 1 where there are none.
        fixed: whether the units must stay in their places.
        parent: the space that this one turned out to be.
        space: what acts where it is no order of units, as heads that turn; such a space joins no other.
        shifts: biases that are free while the space is.
    """

    name: str
    width: int
    groups: int = 1
    fixed: bool = False
    parent: "Units | None" = None
    space: Space | None = None
    shifts: tuple[Shift, ...] = ()

    def root(self) -> "Units":
        """The space that stands for all that are joined."""
        return self if self.parent is None else self.parent.root()

    def fix(self) -> None:
        """Keep the units in their places."""
        self.root().fixed = True

    def whole(self, runs: int) -> None:
        """Move only so many equal runs of units, each as one: they become the units."""
        root = self.root()
        if root.fixed or runs % root.width == 0:
            return
        if root.width % runs or (root.groups % runs and runs % root.groups):
            root.fixed = True
            return
        # Groups that lie within a run stay together by themselves.
        root.groups = root.groups if runs % root.groups == 0 else 1
        root.width = runs

    def grouped(self, groups: int) -> None:
        """Keep `groups` equal runs of units together; other runs than before leave no freedom."""
        root = self.root()
        if root.groups not in (1, groups) or root.width % groups:
            root.fixed = True
        root.groups = groups


@dataclass
class UnitTable:
    """All spaces of a model, in forward order, and the parameter axes bound to them."""

    aliases: dict[str, tuple[str, ...]]
    made: list[Units] = field(default_factory=list)
    bound: dict[tuple[str, int], Units] = field(default_factory=dict)

    def new(self, name: str, width: int) -> Units:
        """A space of its own."""
        self.made.append(Units(name, width))
        return self.made[-1]

    def occupied(self, space: Space, shifts: tuple[Shift, ...] = ()) -> Units:
        """Add units on which a given space acts; bindings of other layers can only fix them."""
        units = self.new(space.name, space.width())
        units.space, units.shifts = space, shifts
        return units

    def join(self, one: Units, other: Units) -> Units:
        """Make the two spaces one; if their units do not correspond, fix both."""
        one, other = one.root(), other.root()
        if one is other:
            return one
        if not (one.space or other.space):
            fine, coarse = sorted((one, other), key=lambda units: -units.width)
            fine.whole(coarse.width)
        if one.width != other.width or one.fixed or other.fixed or one.space or other.space:
            one.fix()
            other.fix()
            return one
        first, second = sorted((one, other), key=self.made.index)
        second.parent = first
        if second.groups > 1:
            first.grouped(second.groups)
        return first

    def bind(self, tensor: str, axis: int, units: Units) -> None:
        """Let the axis of a parameter follow the space, under all of the parameter's names."""
        key = (self.aliases[tensor][0], axis)
        self.bound[key] = self.join(self.bound.get(key, units), units)

    def spaces(self) -> Iterable[Space]:
        """The spaces whose units are free, with every parameter axis that moves with them."""
        for units in self.made:
            if units.space is not None and not units.fixed:
                yield units.space
            elif units.parent is None and not units.fixed and units.width > 1:
                yield Space(units.name, _group(units), tuple(self._axes(units)))

    def shifts(self) -> Iterable[Shift]:
        """The biases that may be moved by a vector."""
        for units in self.made:
            if not units.fixed:
                yield from units.shifts

    def _axes(self, units: Units) -> Iterable[Axis]:
        for (tensor, axis), bound in self.bound.items():
            if bound.root() is units:
                for name in self.aliases[tensor]:
                    yield Axis(name, axis, scored=not _is_statistic(name))


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every saved tensor all names that share its memory.

    Tensors that overlap without being the same get no entry: no axis of one is an axis of the other, so
    nothing about them can be followed.
    """
    same: dict[_Memory, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        same.setdefault(_memory(tensor), []).append(name)
    return {
        name: tuple(names)
        for memory, names in same.items()
        if not any(_overlap(memory, other) for other in same if other != memory)
        for name in names
    }


class _Memory(NamedTuple):
    storage: int
    start: int
    stop: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _memory(tensor: Tensor) -> _Memory:
    # Tensors without memory of their own have no address.
    storage = tensor.untyped_storage().data_ptr() or id(tensor)
    start, shape, stride = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
    steps = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return _Memory(storage, start, start + steps + 1, shape, stride)


def _overlap(one: _Memory, other: _Memory) -> bool:
    return one.storage == other.storage and one.start < other.stop and other.start < one.stop


def _group(units: Units) -> Group:
    if units.groups == 1:
        return Permutation(units.width)
    return Wreath((Permutation(units.width // units.groups),), units.groups)


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var")
