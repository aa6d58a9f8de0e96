"""Feature spaces under construction: a union-find over the units that layers write.

*Units* are a set of features whose order might be free. Every use of a parameter's axis *binds* the axis to units. Two
bindings of one axis unite their units, and so do sums and products of features. Units whose operations cannot be
followed are *fixed*: they keep their places, and so do all units that are ever united with them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from fedbasin.strategies.symmetry.groups.groups import Group, Permutation, Wreath
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry
from fedbasin.strategies.symmetry.translation import Shift
from fedbasin.strategies.tensors.state import MEASURED


@dataclass(eq=False)
class Units:
    """The units that one layer writes, until they are united with those of another layer.

    Attributes:
        name: name of the module that writes them.
        width: number of units.
        groups: number of equal runs of units that a group normalisation keeps together, or 1.
        fixed: True if the units must keep their places.
        parent: the units with which these were united, or None.
        space: the space of units that are not permuted one by one, such as heads; such units unite with no others.
        shifts: biases that are free while the units are.
    """

    name: str
    width: int
    groups: int = 1
    fixed: bool = False
    parent: "Units | None" = None
    space: Space | None = None
    shifts: tuple[Shift, ...] = ()

    def root(self) -> "Units":
        """Return the units that stand for all that are united with these."""
        return self if self.parent is None else self.parent.root()


@dataclass
class UnitTable:
    """All units of a model in forward order, the parameter axes bound to them, and the operations that fix them.

    Attributes:
        aliases: for every tensor that can be followed all names that share its memory.
        operation: the operation that is being followed, or "" where no reason for fixing is recorded.
        stopped: operations and the names of the units they fixed, in the order of their discovery.
    """

    aliases: dict[str, tuple[str, ...]]
    units: list[Units] = field(default_factory=list)
    bound: dict[tuple[str, int], Units] = field(default_factory=dict)
    operation: str = ""
    stopped: dict[tuple[str, str], None] = field(default_factory=dict)

    def new(self, name: str, width: int) -> Units:
        """Add units that are not united with any others."""
        self.units.append(Units(name, width))
        return self.units[-1]

    def occupied(self, space: Space, shifts: tuple[Shift, ...] = ()) -> Units:
        """Add units on which a known space acts; bindings of other layers can only fix them."""
        units = self.new(space.name, space.width())
        units.space, units.shifts = space, shifts
        return units

    def fix(self, units: Units) -> None:
        """Keep units in their places, and record the operation that requires it."""
        root = units.root()
        if not root.fixed and self.operation:
            self.stopped[self.operation, root.name] = None
        root.fixed = True

    def move_runs(self, units: Units, runs: int) -> None:
        """Let only `runs` equal runs of units change places, each as a whole: the runs become the units."""
        root = units.root()
        if root.fixed or runs % root.width == 0:
            return
        if root.width % runs or (root.groups % runs and runs % root.groups):
            self.fix(root)
            return
        # Groups within one run stay together by themselves.
        root.groups = root.groups if runs % root.groups == 0 else 1
        root.width = runs

    def keep_groups(self, units: Units, groups: int) -> None:
        """Keep `groups` equal runs of units together; two different divisions into runs fix the units."""
        root = units.root()
        if root.groups not in (1, groups) or root.width % groups:
            self.fix(root)
        root.groups = groups

    def unite(self, left: Units, right: Units) -> Units:
        """Unite two sets of units; if they do not correspond one to one, fix both."""
        left, right = left.root(), right.root()
        if left is right:
            return left
        if left.fixed or right.fixed:
            # No reason is recorded: it was when the first of the two was fixed, or inputs and labels are fixed anyway.
            left.fixed = right.fixed = True
            return left
        # Units that own several entries each, as groups of channels do, make the others move in runs too.
        if not (left.space or right.space):
            fine, coarse = sorted((left, right), key=lambda units: -units.width)
            self.move_runs(fine, coarse.width)
        if left.width != right.width or left.fixed or right.fixed or left.space or right.space:
            self.fix(left)
            self.fix(right)
            return left
        # The earlier units stay, so that spaces are in forward order and named after the first module that writes them.
        root, child = sorted((left, right), key=self.units.index)
        child.parent = root
        if child.groups > 1:
            self.keep_groups(root, child.groups)
        return root

    def bind(self, tensor: str, axis: int, units: Units) -> None:
        """Bind an axis of a parameter to units, under all names of the parameter."""
        key = (self.aliases[tensor][0], axis)
        current = self.bound.get(key, units)
        if units.root().fixed:
            # A second use of the parameter fixes what an earlier use left free.
            self.fix(current)
        self.bound[key] = self.unite(current, units)

    def symmetry(self) -> Symmetry:
        """Return the spaces whose units are free, and the shifts that are free with them."""
        shifts = (shift for units in self.units if not units.fixed for shift in units.shifts)
        return Symmetry(tuple(self._spaces()), shifts=tuple(shifts))

    def _spaces(self) -> Iterable[Space]:
        for units in self.units:
            if units.space is not None and not units.fixed:
                yield units.space
            elif units.parent is None and not units.fixed and units.width > 1:
                yield Space(units.name, _group(units), tuple(self._axes(units)))

    def _axes(self, units: Units) -> Iterable[Axis]:
        for (tensor, axis), bound in self.bound.items():
            if bound.root() is units:
                for name in self.aliases[tensor]:
                    yield Axis(name, axis, scored=not name.endswith(MEASURED))


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return for every saved tensor all names that share its memory.

    Tensors that overlap without being equal are left out: no axis of one is an axis of the other, so nothing about them
    can be followed.
    """
    names: dict[_Memory, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(_memory(tensor), []).append(name)
    return {
        name: tuple(group)
        for memory, group in names.items()
        if not any(_overlap(memory, rival) for rival in names if rival != memory)
        for name in group
    }


class _Memory(NamedTuple):
    storage: int
    start: int
    stop: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _memory(tensor: Tensor) -> _Memory:
    # Meta tensors have no address.
    storage = tensor.untyped_storage().data_ptr() or id(tensor)
    start, shape, stride = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
    steps = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return _Memory(storage, start, start + steps + 1, shape, stride)


def _overlap(a: _Memory, b: _Memory) -> bool:
    return a.storage == b.storage and a.start < b.stop and b.start < a.stop


def _group(units: Units) -> Group:
    if units.groups == 1:
        return Permutation(units.width)
    return Wreath((Permutation(units.width // units.groups),), units.groups)
