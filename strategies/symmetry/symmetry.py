"""A symmetry as data: the spaces of an architecture, and a notation for them.

A *space* is a feature space inside a model. A group acts on it, and the function of the model stays the same if the
group acts on every tensor that writes or reads the space. In the notation a space is one line:

    hidden   S(512)              0.weight[0] 0.bias[0] 2.weight[1]
    conv1    S(16)               conv.weight[0] bn.weight[0] bn.bias[0] (bn.running_mean[0]) fc.weight[1]
    heads.0  O(8)*O(8) wr S(4)   q.weight[0]@0 q.bias[0]@0 k.weight[0]@0 v.weight[0]@1 o.weight[1]@1
    fused.0  O(8)^4              in_proj.weight[0,0:32] in_proj.weight[0,32:64]
    heads.1  O(8) wr S(4)        qkv.weight[0,0:8/24] qkv.weight[0,8:16/24]
    moe.0    S(16) wr S(4)       experts.up[0.1] experts.down[0.2]

`tensor[axis]` is an axis that the space owns, and `tensor[axis,start:stop]` a part of it. With `/period` it is that
part of every run of `period` entries (heads whose query, key and value are interleaved), and with `outer.` before the
axis that part of every slice along the outer axis (stacked experts). `@role` selects one of the feature spaces of the
group. Parentheses mark axes that are transformed with the space but do not count in matching. If an axis is longer
than the space, every unit owns a run of consecutive entries (a flattened channel). A line `norm ->
reader.weight[axis] ...` is a norm whose weight must be folded into its readers first (`folding.py`), and a line `+
key.bias` is a bias to which any vector may be added (`translation.py`).
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedbasin.strategies.symmetry.folding import Fold, check_folds, fold, parse_fold
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.groups.group_notation import parse_group
from fedbasin.strategies.symmetry.groups.groups import Group
from fedbasin.strategies.symmetry.symmetry_error import SymmetryError as SymmetryError
from fedbasin.strategies.symmetry.translation import Shift, nearest, parse_shift, translate
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor, or a part of it, on which the elements of a space act.

    Attributes:
        tensor: name of the tensor in the state.
        dim: dimension of the tensor on which the element acts.
        part: start and stop on that dimension, or None for all of it.
        role: index of the group's feature space.
        scored: True if the axis counts in matching. Running statistics are transformed with their unit, but their size
            does not tell which unit it is.
        period: number of entries in a run, if the part is a part of every run instead of the whole dimension.
        outer: dimension whose slices hold the blocks, so that units are numbered along it first and along `dim` second.
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
        """True if the axis covers every entry of the tensor."""
        return self.part is None and self.outer is None

    def length(self, shape: tuple[int, ...]) -> int:
        """Return the number of entries of the part along all dimensions that number the units."""
        period = self.period or shape[self.dim]
        start, stop = self.part or (0, period)
        slices = 1 if self.outer is None else shape[self.outer]
        return (stop - start) * (shape[self.dim] // period) * slices

    def view(self, tensor: Tensor) -> Tensor:
        """Return the part of `tensor` that the space owns, as a view."""
        if self.part is None:
            return tensor
        start, stop = self.part
        if self.period is None:
            return tensor.narrow(self.dim, start, stop - start)
        runs = tensor.unflatten(self.dim, (-1, self.period))
        return runs.narrow(self.dim + 1, start, stop - start)

    def rows(self, tensor: Tensor, width: int) -> Tensor:
        """Return the part as a matrix `[width, features]` with one row for every unit of the space."""
        return self._units(tensor).reshape(width, -1)

    def replace(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """Return `tensor` with the part replaced by a matrix `[width, features]`, the inverse of `rows`."""
        result = tensor.clone()
        target = self._units(result)
        target.copy_(rows.reshape(target.shape))
        return result

    def act(self, element: Element, tensor: Tensor) -> Tensor:
        """Return `tensor` with the element applied to the part."""
        # Whole axes are the common case, and need no copy of the tensor to write into.
        if self.is_whole:
            return element.act(tensor, self.dim, self.role)
        result = tensor.clone()
        # A gradient needs the units as they were, so they are not read from the copy that is written into.
        units = self._units(tensor).flatten(0, self._depth - 1)
        target = self._units(result)
        target.copy_(element.act(units, 0, self.role).reshape(target.shape))
        return result

    @property
    def _depth(self) -> int:
        """Number of dimensions of the view along which the units are numbered."""
        return 1 + (self.period is not None) + (self.outer is not None)

    def _units(self, tensor: Tensor) -> Tensor:
        """Return the view with the dimensions that number the units in front, the outermost first."""
        view = self.view(tensor)
        runs = self._depth - (self.outer is not None)
        outer = [] if self.outer is None else [self.outer + (runs - 1) * (self.outer > self.dim)]
        return view.movedim((*outer, *range(self.dim, self.dim + runs)), tuple(range(self._depth)))


@dataclass(frozen=True)
class Space:
    """A feature space, the group that acts on it, and the axes on which it appears.

    Attributes:
        name: name of the space, unique in its symmetry and without white space.
        group: the group that acts on it.
        axes: every axis that writes or reads the space.
    """

    name: str
    group: Group
    axes: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"{self.name}  {self.group}  " + " ".join(map(str, self.axes))

    def width(self, role: int = 0) -> int:
        """Return the number of units of one role."""
        return self.group.count * self.group.sizes[role]

    @cached_property
    def scored(self) -> tuple[Axis, ...]:
        """The axes that count in matching."""
        return tuple(axis for axis in self.axes if axis.scored)

    @cached_property
    def quadratic(self) -> bool:
        """True if one tensor carries the space on two axes, so that the objective is not linear in the element."""
        axes = {(axis.tensor, axis.dim) for axis in self.scored}
        return len(axes) > len({tensor for tensor, _ in axes})


@dataclass(frozen=True)
class Symmetry:
    """All spaces of an architecture, with its folds and shifts.

    Law: `parse(str(s)) == s`.

    Attributes:
        spaces: the spaces in the order in which matching visits them.
        folds: norms whose weights must be 1, so that the elements keep the function.
        shifts: biases to which any vector may be added.

    Raises:
        SymmetryError: two spaces have one name, or a space cannot be written in the notation.
    """

    spaces: tuple[Space, ...]
    folds: tuple[Fold, ...] = ()
    shifts: tuple[Shift, ...] = ()

    def __post_init__(self) -> None:
        names = [space.name for space in self.spaces]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise SymmetryError(f"space {duplicates[0]!r} stands twice; give every space a name of its own")
        for space in self.spaces:
            # Server and clients compare digests of the notation, so a symmetry must survive being written and read.
            if _parse_space(str(space)) != space:
                raise SymmetryError(
                    f"space {space.name!r} cannot be written down as {space}; names must not contain white "
                    "space or brackets, and numbers must be positive"
                )

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in (*self.spaces, *self.folds, *self.shifts))

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the notation; two parties with the same digest transform the same tensors."""
        return hashlib.sha256(str(self).encode()).digest()

    def fold(self, state: State) -> dict[str, Tensor]:
        """Fold every norm into its readers, which keeps the function; without folds the state is only copied.

        Raises:
            SymmetryError: a bias would have to be divided by a weight that is almost 0.
        """
        return fold(self.folds, state)

    def translate(self, anchor: State, client: State) -> dict[str, Tensor]:
        """Shift the client's biases as close to the anchor as the function allows.

        The shifts are exact minimisers for the client's present projections, so align the client first.
        """
        return translate(nearest(self.shifts, anchor, client), client)

    def check(self, state: State) -> None:
        """Check that every axis, fold and shift fits the tensors of a model; only shapes and types are read.

        Raises:
            SymmetryError: a tensor is missing or not floating, an axis is not a multiple of the width of its space, a
                role has no scored axis, two axes overlap, or a fold or shift does not fit.
        """
        for space in self.spaces:
            _check_roles(space)
            for axis in space.axes:
                _check_axis(space, axis, state)
        _check_overlaps(self, state)
        check_folds(self.folds, state)
        for shift in self.shifts:
            shift.check(state)


def _check_axis(space: Space, axis: Axis, state: State) -> None:
    where = f"space {space.name!r}, axis {axis}"
    if axis.tensor not in state:
        raise SymmetryError(f"{where}: the model has no such tensor; was it made for another model?")
    if not state[axis.tensor].is_floating_point():
        raise SymmetryError(f"{where}: the tensor is {state[axis.tensor].dtype}; only floating tensors can be matched")
    shape = tuple(state[axis.tensor].shape)
    if not -1 < axis.dim < len(shape):
        raise SymmetryError(f"{where}: the tensor has shape {shape} and no axis {axis.dim}; axes are counted from 0")
    if not axis.role < len(space.group.sizes):
        raise SymmetryError(
            f"{where}: {space.group} has roles 0 to {len(space.group.sizes) - 1}; name one of them after @"
        )
    _check_part(where, space.width(axis.role), axis, shape)


def _check_part(where: str, width: int, axis: Axis, shape: tuple[int, ...]) -> None:
    length = shape[axis.dim]
    period = axis.period or length
    start, stop = axis.part or (0, period)
    if length % period:
        raise SymmetryError(
            f"{where}: an axis of {length} does not fall into runs of {period}; give a period that divides it"
        )
    if axis.outer is not None and (axis.outer == axis.dim or not -1 < axis.outer < len(shape)):
        raise SymmetryError(
            f"{where}: the tensor has shape {shape} and no outer axis {axis.outer}; give another of its axes"
        )
    if not 0 <= start < stop <= period or axis.length(shape) % width:
        raise SymmetryError(
            f"{where}: entries {start} to {stop} of an axis of {length} are not a multiple "
            f"of the space's {width} units; correct the part, or the group of the space"
        )


def _check_roles(space: Space) -> None:
    # A maximiser needs a score for every role, and scores are sums over scored axes.
    unscored = set(range(len(space.group.sizes))) - {axis.role for axis in space.scored}
    if unscored:
        raise SymmetryError(
            f"space {space.name!r} has no scored axis on role {min(unscored)}; add one, so that the role can be matched"
        )


def _check_overlaps(symmetry: Symmetry, state: State) -> None:
    # Owners are numbered by their space, or by -2 - space along an outer axis; -1 is no owner.
    owners: dict[tuple[str, int], Tensor] = {}
    for number, space in enumerate(symmetry.spaces):
        for axis in space.axes:
            for dim, claim in _claims(axis):
                length = state[axis.tensor].shape[dim]
                whole = owners.setdefault((axis.tensor, dim), torch.full((length,), -1))
                entries = claim.view(whole)
                is_outer = dim != axis.dim
                # Axes of one space may share an outer axis, because they move along it together.
                rivals = entries[(entries != -1) & ((entries != -2 - number) | (not is_outer))]
                if rivals.numel():
                    code = int(rivals[0])
                    owner = symmetry.spaces[code if code >= 0 else -2 - code].name
                    raise SymmetryError(
                        f"space {space.name!r}, axis {axis}: space {owner!r} already moves entries of "
                        f"this axis; give each entry to one space"
                    )
                entries.fill_(-2 - number if is_outer else number)


def _claims(axis: Axis) -> Iterator[tuple[int, Axis]]:
    """Yield the dimensions along which an axis moves entries, each with the part of it as an axis of a vector."""
    yield axis.dim, Axis(axis.tensor, 0, axis.part, period=axis.period)
    if axis.outer is not None:
        yield axis.outer, Axis(axis.tensor, 0)


_AXIS = re.compile(
    r"(?P<open>\()?(?P<tensor>[^\s\[\]()]+)\[(?:(?P<outer>\d+)\.)?(?P<axis>\d+)"
    r"(?:,(?P<start>\d+):(?P<stop>\d+)(?:/(?P<period>\d+))?)?\](?:@(?P<role>\d+))?(?P<close>\))?"
)
# Axes have brackets and groups have none, which is how the two are told apart.
_LINE = re.compile(r"(?P<name>[^\s#]\S*)\s+(?P<group>[^\[\]]*\S)\s+(?P<axes>[^\s\[\]]+\[.*)")


def parse(text: str) -> Symmetry:
    """Parse a symmetry in the notation; blank lines and lines that begin with `#` are skipped.

    Raises:
        SymmetryError: a line is not in the notation; the message names it.
    """
    lines = [line for raw in text.splitlines() if (line := raw.strip()) and line[0] != "#"]
    # Names may contain "+" and "->", so only a sign that stands by itself makes a shift or a fold.
    shifts = tuple(parse_shift(line) for line in lines if line.startswith("+ "))
    folds = tuple(parse_fold(line) for line in lines if " -> " in line)
    spaces = (line for line in lines if " -> " not in line and not line.startswith("+ "))
    return Symmetry(tuple(_parse_space(line) for line in spaces), folds, shifts)


def _parse_space(line: str) -> Space:
    match = _LINE.fullmatch(line)
    if match is None:
        raise SymmetryError(f"not a space: {line!r}; write `name  S(8)  tensor[axis] ...`")
    axes = tuple(_parse_axis(word, line) for word in match["axes"].split())
    return Space(match["name"], _parse_group(match["group"], line), axes)


def _parse_axis(word: str, line: str) -> Axis:
    match = _AXIS.fullmatch(word)
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


def _parse_group(text: str, line: str) -> Group:
    try:
        return parse_group(text)
    except SymmetryError as error:
        raise SymmetryError(f"{error} in {line!r}") from error
