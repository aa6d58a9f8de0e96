"""A symmetry as data: the spaces of an architecture, and a notation for them.

A *space* is a feature space inside a model; its group may act on it without changing the function, if it acts
on every tensor that writes or reads the space. In the notation a space is one line:

    hidden   S(512)              0.weight[0] 0.bias[0] 2.weight[1]
    conv1    S(16)               conv.weight[0] bn.weight[0] bn.bias[0] (bn.running_mean[0]) fc.weight[1]
    heads.0  O(8)*O(8) wr S(4)   q.weight[0]@0 q.bias[0]@0 k.weight[0]@0 v.weight[0]@1 o.weight[1]@1
    fused.0  O(8)^4              in_proj.weight[0,0:32] in_proj.weight[0,32:64]
    heads.1  O(8) wr S(4)        qkv.weight[0,0:8/24] qkv.weight[0,8:16/24]
    moe.0    S(16) wr S(4)       experts.up[0.1] experts.down[0.2]

`tensor[axis]` is the axis that the space owns and `tensor[axis,start:stop]` a part of it; with `/period` that
part of every run of `period` entries (heads whose query, key and value are interleaved), and with `outer.` before
the axis that part of every slice along the outer axis (stacked experts). `@role` says which of the group's
feature spaces it is; parentheses mark what moves with the space but does not count in matching. An axis that is
longer than the space gives every unit a run of consecutive entries (a flattened channel). A line
`norm -> reader.weight[axis] ...` is a norm whose gain must be folded first (`folding.py`), a line `+ key.bias` a
bias that any vector may be added to (`translation.py`).
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from fedbasin.strategies.symmetry.folding import Fold, FoldError, check_folds, fold, read_fold
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.groups.group_notation import NotationError, read
from fedbasin.strategies.symmetry.groups.groups import Group
from fedbasin.strategies.symmetry.translation import Shift, ShiftError, nearest, read_shift
from fedbasin.strategies.tensors.state import State

_Line = TypeVar("_Line", Fold, Shift)


class SymmetryError(ValueError):
    """A symmetry that does not parse, or does not fit the tensors that it names."""


@dataclass(frozen=True)
class Axis:
    """One axis of one tensor that belongs to a space.

    Attributes:
        tensor: name in the state.
        dim: the axis of the tensor that the element acts on.
        part: start and stop on that axis, or None for all of it.
        role: which of the group's feature spaces it is.
        scored: whether it counts in matching. Running statistics move with their unit, but their size
            says nothing about which unit it is.
        period: the part is that of every run of so many entries, not of the axis.
        outer: an axis whose slices hold the blocks one after the other, before those of `axis`.
    """

    tensor: str
    dim: int
    part: tuple[int, int] | None = None
    role: int = 0
    scored: bool = True
    period: int | None = None
    outer: int | None = None

    def __str__(self) -> str:
        outer = "" if self.outer is None else f"{self.outer}."
        period = "" if self.period is None else f"/{self.period}"
        part = f",{self.part[0]}:{self.part[1]}{period}" if self.part else ""
        role = f"@{self.role}" if self.role else ""
        text = f"{self.tensor}[{outer}{self.dim}{part}]{role}"
        return text if self.scored else f"({text})"

    @property
    def is_whole(self) -> bool:
        """Whether it is the tensor's every entry."""
        return self.part is None and self.outer is None

    def view(self, tensor: Tensor) -> Tensor:
        """The part of `tensor` that the space owns, sharing its memory."""
        if self.part is None:
            return tensor
        start, stop = self.part
        if self.period is None:
            return tensor.narrow(self.dim, start, stop - start)
        runs = tensor.unflatten(self.dim, (-1, self.period))
        return runs.narrow(self.dim + 1, start, stop - start)

    def rows(self, tensor: Tensor, width: int) -> Tensor:
        """The part as a matrix `[width, features]`: one row for every unit of the space."""
        return self._units(tensor).reshape(width, -1)

    def act(self, element: Element, tensor: Tensor) -> Tensor:
        """`tensor` with the element applied to the part."""
        if self.is_whole:
            return element.act(tensor, self.dim, self.role)
        result = tensor.clone()
        units = self._units(result)
        moved = element.act(units.flatten(0, self._depth - 1), 0, self.role)
        units.copy_(moved.reshape(units.shape))
        return result

    @property
    def _depth(self) -> int:
        """How many axes of the view number the units."""
        return 1 + (self.period is not None) + (self.outer is not None)

    def _units(self, tensor: Tensor) -> Tensor:
        """The view with the axes that number the units first, from the outermost in."""
        view = self.view(tensor)
        runs = self._depth - (self.outer is not None)
        outer = [] if self.outer is None else [self.outer + (runs - 1) * (self.outer > self.dim)]
        return view.movedim((*outer, *range(self.dim, self.dim + runs)), tuple(range(self._depth)))


@dataclass(frozen=True)
class Space:
    """A feature space, what may act on it, and where it appears."""

    name: str
    group: Group
    axes: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"{self.name}  {self.group}  " + " ".join(map(str, self.axes))

    def width(self, role: int = 0) -> int:
        """Units of one role."""
        return self.group.count * self.group.sizes[role]

    @cached_property
    def scored(self) -> tuple[Axis, ...]:
        """The axes that count in matching."""
        return tuple(axis for axis in self.axes if axis.scored)

    @cached_property
    def quadratic(self) -> bool:
        """Whether one tensor carries the space on two axes, so that no step is an exact maximiser."""
        axes = {(axis.tensor, axis.dim) for axis in self.scored}
        return len(axes) > len({tensor for tensor, _ in axes})


@dataclass(frozen=True)
class Symmetry:
    """All spaces of an architecture. `parse(str(s)) == s`.

    Attributes:
        spaces: in the order in which matching visits them.
        folds: norms whose gains must be 1 for the spaces' elements to keep the function.
        shifts: biases that may be moved by a vector.
    """

    spaces: tuple[Space, ...]
    folds: tuple[Fold, ...] = ()
    shifts: tuple[Shift, ...] = ()

    def __post_init__(self) -> None:
        names = [space.name for space in self.spaces]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SymmetryError(
                f"space {twice[0]!r} stands twice; every space needs a name of its own"
            )
        for space in self.spaces:
            if _space(str(space)) != space:
                raise SymmetryError(f"space {space.name!r} cannot be written down: {space}")

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in (*self.spaces, *self.folds, *self.shifts))

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the notation: two parties with the same digest move the same tensors."""
        return hashlib.sha256(str(self).encode()).digest()

    def fold(self, state: State) -> dict[str, Tensor]:
        """The same function in the parametrisation on which the elements act; without folds the same state.

        Raises:
            FoldError: a norm's gain vanishes where it would have to be divided by.
        """
        return fold(self.folds, state)

    def translate(self, anchor: State, client: State) -> dict[str, Tensor]:
        """The client's function in the biases that are closest to the anchor; without shifts the same state.

        It is exact, but depends on the client's projections: those should be aligned already.
        """
        return nearest(self.shifts, anchor, client).act(client)

    def check(self, state: State) -> None:
        """Check that every axis and every fold fits the tensors of a model.

        Raises:
            SymmetryError: a tensor is missing or not floating, an axis is not a multiple of its space's
                width, a role has nothing to match by, two axes overlap, or a norm or shift does not fit.
        """
        for space in self.spaces:
            _check_roles(space)
            for axis in space.axes:
                _check(space, axis, state)
        _check_overlaps(self, state)
        try:
            check_folds(self.folds, state)
            for shift in self.shifts:
                shift.check(state)
        except (FoldError, ShiftError) as error:
            raise SymmetryError(str(error)) from error


def _check(space: Space, axis: Axis, state: State) -> None:
    where = f"space {space.name!r}, axis {axis}"
    if axis.tensor not in state:
        raise SymmetryError(
            f"{where}: the model has no such tensor; was it made for another model?"
        )
    if not state[axis.tensor].is_floating_point():
        raise SymmetryError(
            f"{where}: the tensor is {state[axis.tensor].dtype}; only floating tensors can be matched"
        )
    shape = tuple(state[axis.tensor].shape)
    if not -1 < axis.dim < len(shape):
        raise SymmetryError(f"{where}: the tensor has shape {shape} and no axis {axis.dim}")
    if not axis.role < len(space.group.sizes):
        raise SymmetryError(f"{where}: {space.group} has roles 0 to {len(space.group.sizes) - 1}")
    _check_part(where, space.width(axis.role), axis, shape)


def _check_part(where: str, width: int, axis: Axis, shape: tuple[int, ...]) -> None:
    length = shape[axis.dim]
    period = axis.period or length
    start, stop = axis.part or (0, period)
    if length % period:
        raise SymmetryError(f"{where}: an axis of {length} does not fall into runs of {period}")
    if axis.outer is not None and (axis.outer == axis.dim or not -1 < axis.outer < len(shape)):
        raise SymmetryError(f"{where}: the tensor has shape {shape} and no outer axis {axis.outer}")
    slices = 1 if axis.outer is None else shape[axis.outer]
    if not 0 <= start < stop <= period or (stop - start) * (length // period) * slices % width:
        raise SymmetryError(
            f"{where}: entries {start} to {stop} of an axis of {length} are not a multiple "
            f"of the space's {width} units"
        )


def _check_roles(space: Space) -> None:
    silent = set(range(len(space.group.sizes))) - {axis.role for axis in space.scored}
    if silent:
        raise SymmetryError(
            f"space {space.name!r} has no scored axis on role {min(silent)}; add one to match by"
        )


def _check_overlaps(symmetry: Symmetry, state: State) -> None:
    owners: dict[tuple[str, int], Tensor] = {}
    for number, space in enumerate(symmetry.spaces):
        for axis in space.axes:
            for dim, claim in _claims(axis):
                length = state[axis.tensor].shape[dim]
                whole = owners.setdefault((axis.tensor, dim), torch.full((length,), -1))
                entries = claim.view(whole)
                # Members of one space may have an outer axis in common: all move along it together.
                taken = entries[entries != (-1 if dim == axis.dim else -2 - number)]
                taken = taken[taken != -1]
                if taken.numel():
                    other = _owner(symmetry, int(taken[0]))
                    raise SymmetryError(
                        f"space {space.name!r}, axis {axis}: space {other!r} already moves entries of "
                        f"this axis; give each entry to one space"
                    )
                entries.fill_(number if dim == axis.dim else -2 - number)


def _claims(axis: Axis) -> Iterator[tuple[int, Axis]]:
    """The axes along which an axis moves entries, with its part of them as a vector."""
    yield axis.dim, Axis(axis.tensor, 0, axis.part, period=axis.period)
    if axis.outer is not None:
        yield axis.outer, Axis(axis.tensor, 0)


def _owner(symmetry: Symmetry, code: int) -> str:
    return symmetry.spaces[code if code >= 0 else -2 - code].name


_MEMBER = re.compile(
    r"(?P<open>\()?(?P<tensor>[^\s\[\]()]+)\[(?:(?P<outer>\d+)\.)?(?P<axis>\d+)"
    r"(?:,(?P<start>\d+):(?P<stop>\d+)(?:/(?P<period>\d+))?)?\](?:@(?P<role>\d+))?(?P<close>\))?"
)
# Members have brackets and groups have none.
_LINE = re.compile(r"(?P<name>[^\s#]\S*)\s+(?P<group>[^\[\]]*\S)\s+(?P<axes>[^\s\[\]]+\[.*)")


def parse(text: str) -> Symmetry:
    """Read the notation; blank lines and lines that begin with `#` are skipped.

    Raises:
        SymmetryError: naming the line that is not in the notation.
    """
    lines = [line for raw in text.splitlines() if (line := raw.strip()) and line[0] != "#"]
    shifts = tuple(_read(read_shift, line) for line in lines if line.startswith("+ "))
    folds = tuple(_read(read_fold, line) for line in lines if " -> " in line)
    rest = (line for line in lines if " -> " not in line and not line.startswith("+ "))
    return Symmetry(tuple(_space(line) for line in rest), folds, shifts)


def _read(read_line: Callable[[str], _Line], line: str) -> _Line:
    try:
        return read_line(line)
    except (FoldError, ShiftError) as error:
        raise SymmetryError(str(error)) from error


def _space(line: str) -> Space:
    match = _LINE.fullmatch(line)
    if match is None:
        raise SymmetryError(f"not a space: {line!r}; write `name  S(8)  tensor[axis] ...`")
    axes = tuple(_axis(word, line) for word in match["axes"].split())
    return Space(match["name"], _group(match["group"], line), axes)


def _axis(word: str, line: str) -> Axis:
    match = _MEMBER.fullmatch(word)
    if match is None or (match["open"] is None) != (match["close"] is None):
        raise SymmetryError(f"not an axis: {word!r} in {line!r}; write `tensor[axis]`")
    part = (int(match["start"]), int(match["stop"])) if match["start"] else None
    return Axis(
        tensor=match["tensor"],
        dim=int(match["axis"]),
        part=part,
        role=int(match["role"] or 0),
        scored=match["open"] is None,
        period=int(match["period"]) if match["period"] else None,
        outer=int(match["outer"]) if match["outer"] else None,
    )


def _group(text: str, line: str) -> Group:
    try:
        return read(text)
    except NotationError as error:
        raise SymmetryError(f"{error} in {line!r}") from error
