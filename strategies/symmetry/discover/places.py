"""Where units appear in the tensors of a model, and which units may depend on which.

A *cell* is a set of units that moves as one: a leaf that is free, or a node whose leaves are all fixed, such as the
entries of a head under rotary positions. The cells of a place are nested: heads first, then the entries of a head.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fedbasin.strategies.symmetry.discover.units import Axis as UnitAxis
from fedbasin.strategies.symmetry.discover.units import Units, length
from fedbasin.strategies.symmetry.discover.walk import Value

# An axis whose fixed outer units are more than these is not written as so many parts.
_MOST_PARTS = 1024


class UnwritableError(ValueError):
    """A place that the notation cannot express unless some units keep their places."""

    def __init__(self, units: Units) -> None:
        super().__init__(units.name)
        self.units = units


@dataclass(frozen=True, eq=False)
class Place:
    """A part of an axis of a tensor, as nested cells.

    Attributes:
        tensor: name of the tensor.
        dim: dimension of the tensor.
        cells: the cells along the part, outermost first.
        part: start and stop of the part, or None for the whole axis.
        period: number of entries in a run, if the part is a part of every run.
        outer: dimension that holds the first of the cells, if it is not `dim`.
        before: the other terms of a concatenation that stand before the part.
        rows: fixed units along which the axis was taken apart, each with the number of this part.
    """

    tensor: str
    dim: int
    cells: tuple[Units, ...]
    part: tuple[int, int] | None = None
    period: int | None = None
    outer: int | None = None
    before: tuple[Units, ...] = ()
    rows: tuple[tuple[Units, int], ...] = ()


def places(parameters: Mapping[str, Value]) -> Iterator[Place]:
    """Yield every place of every tensor.

    Raises:
        UnwritableError: a place cannot be written.
    """
    nodes: dict[tuple[Units, int], Units] = {}
    for name, value in parameters.items():
        for dim, axis in enumerate(value.axes):
            for place in _Tensor(name, dim, length(axis)).parts(axis) if axis else ():
                # Nodes of fixed entries that begin with the same leaf are one node, seen through different operators.
                def node(c: Units) -> Units:
                    return nodes.setdefault((next(c.leaves()), c.size), c) if c.is_fixed else c

                rows = tuple((node(units), number) for units, number in place.rows)
                yield replace(place, cells=tuple(map(node, place.cells)), rows=rows)


def _cells(axis: UnitAxis) -> list[Units]:
    """Return the units along an axis with all products multiplied out that are not fixed as a whole."""
    result: list[Units] = []
    for units in axis:
        root = units.root()
        result += _cells(root.parts) if root.kind == "product" and not root.is_fixed else [root]
    return result


@dataclass(frozen=True)
class _Tensor:
    name: str
    dim: int
    length: int

    def parts(
        self,
        axis: UnitAxis,
        start: int = 0,
        stop: int | None = None,
        period: int | None = None,
        preceding: tuple[Units, ...] = (),
        rows: tuple[tuple[Units, int], ...] = (),
    ) -> Iterator[Place]:
        """Yield the places of an axis, which may be a part of that of the tensor."""
        stop = self.length if stop is None else stop
        cells = _cells(axis)
        number = next((n for n, cell in enumerate(cells) if self._divides(cells, n)), None)
        if number is None:
            whole = start == 0 and stop == (period or self.length)
            stretch = None if whole else (start, stop)
            run = None if whole else period
            yield Place(self.name, self.dim, tuple(cells), stretch, run, before=preceding, rows=rows)
            return
        outer, cell, inner = cells[:number], cells[number], cells[number + 1 :]
        run = length(inner)
        if outer and period is None:
            if start or stop != self.length:
                raise UnwritableError(outer[0])
            period = cell.size * run
        elif outer and period != cell.size * run and (stop - start) != cell.size * run:
            raise UnwritableError(outer[0])
        if cell.is_fixed and cell.size > _MOST_PARTS:
            raise UnwritableError(next(units for units in (*inner, *outer) if not units.is_fixed))
        for row, (part, size) in enumerate(self._divisions(cell)):
            pieces = [*outer, *part, *inner]
            numbered = (*rows, (cell, row)) if cell.is_fixed else rows
            yield from self.parts(pieces, start, start + size * run, period, preceding, numbered)
            preceding = (*preceding, *part)
            start += size * run

    @staticmethod
    def _divides(cells: list[Units], number: int) -> bool:
        """Return whether an axis must be written part by part along one of its cells."""
        cell, later = cells[number], cells[number + 1 :]
        if cell.is_fixed:
            # Heads that keep their order on a key that they share: each of them has the entries of the key.
            return any(not inner.is_fixed for inner in later) or (cell.outer and number > 0 and bool(later))
        return cell.kind == "sum"

    @staticmethod
    def _divisions(cell: Units) -> list[tuple[list[Units], int]]:
        if cell.kind == "sum" and not cell.is_fixed:
            return [([part.root()] if part.size > 1 else [], part.size) for part in cell.parts]
        return [([], 1)] * cell.size
