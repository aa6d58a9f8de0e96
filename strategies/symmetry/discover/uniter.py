"""Refinement and union of units, where values are reshaped, cut, stacked and summed."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from fedbasin.strategies.symmetry.discover.units import Axis, Units, concatenation, factors, fixed, length

_T = TypeVar("_T")

Fix = Callable[..., None]


def _reason_of(units: Units) -> tuple[str, str] | None:
    """Return why units keep their places; None, the operation that is being followed, where they always did."""
    return units.reason if units.reason[0] else None


class Uniter:
    """Refines and unites units; where structures do not fit each other, the units are fixed by `fix`."""

    def __init__(self, fix: Fix) -> None:
        self.fix = fix

    def unite(self, left: Axis, right: Axis) -> None:
        """Unite two axes of equal length entry by entry."""
        a, b = [units.root() for units in left], [units.root() for units in right]
        while a and b:
            if a[0].size == b[0].size:
                self._unite_units(a.pop(0).root(), b.pop(0).root())
                continue
            big, small = (a, b) if a[0].size > b[0].size else (b, a)
            if not (self._refine(big, small[0].size) or self._refine(small, 0)):
                break
        if a or b:
            self.fix([*a, *b])

    def _refine(self, axis: list[Units], size: int) -> bool:
        """Replace the first units of an axis by their factors, of which the first has the given size if it can."""
        units = axis[0].root()
        parts = list(units.parts) if units.kind == "product" else self._take_outer(units, size) if size else None
        if parts:
            axis[:1] = [part.root() for part in parts]
        return parts is not None

    def _unite_units(self, x: Units, y: Units) -> None:
        x, y = self._collapse(x), self._collapse(y)
        if x is y:
            return
        x, y = sorted((x, y), key=lambda units: units.number)
        if x.kind and y.kind:
            self._unite_parts(x, y)
            x, y = x.root(), y.root()
            if x is y:
                return
        # The refined one stays, under the name of the earlier one.
        root, child = (y, x) if y.kind and not x.kind else (x, y)
        if child.fixed and not child.kind:
            self.fix([root], _reason_of(child))
        if root.fixed and not root.kind and not child.fixed:
            self.fix([child], _reason_of(root))
        root.name, root.number = x.name or y.name, x.number
        root.outer, root.united = root.outer or child.outer, True
        for leaf in root.leaves():
            leaf.bent = leaf.bent or (child.bent and not child.kind)
            leaf.averaged = leaf.averaged or (child.averaged and not child.kind)
        child.parent = root

    def _unite_parts(self, x: Units, y: Units) -> None:
        if x.kind == y.kind == "product":
            self.unite(x.parts, y.parts)
            return
        if x.kind == y.kind and [part.size for part in x.parts] == [part.size for part in y.parts]:
            for part, rival in zip(x.parts, y.parts, strict=True):
                self._unite_units(part.root(), rival.root())
            return
        sizes = _common([list(map(length, terms(x))), list(map(length, terms(y)))])
        lefts, rights = self.cut([x], sizes), self.cut([y], sizes)
        for left, right in zip(lefts, rights, strict=True):
            self.unite(left, right)

    def _take_outer(self, units: Units, size: int) -> list[Units] | None:
        """Refine units to a product whose first factor has the given size, if that is possible."""
        if units.size % size:
            return None
        if units.kind == "family":
            members = [self._factors_of(part.root(), size) for part in units.parts]
            return None if None in members else [_family(units, parts) for parts in zip(*members, strict=True)]
        if not units.kind:
            units.kind, units.parts = "product", (units.part(size), units.part(units.size // size))
            units.parts[0].whole = units
            return list(units.parts)
        return self._take_heads(units, units.size // size) if units.kind == "sum" else None

    def _take_heads(self, units: Units, entries: int) -> list[Units] | None:
        """Refine a concatenation of runs of heads to heads and the entries inside them, which differ from run to run."""
        if any(part.size % entries for part in units.parts):
            return None
        runs = [self._factors_of(part.root(), part.size // entries) for part in units.parts]
        if any(run is None or len(run) > 2 for run in runs):
            return None
        heads, members = zip(*((run[:-1], run[-1]) for run in runs if run), strict=True)
        index = Units(len(heads), fixed=True) if not any(heads) else concatenation(heads)[0]
        return [index, Units(entries, kind="family", parts=members, index=index)]

    def _factors_of(self, units: Units, size: int) -> list[Units] | None:
        if size == 1:
            return [units]
        if units.kind == "product" and units.parts[0].size == size:
            return list(units.parts)
        return self._take_outer(units, size)

    def _collapse(self, units: Units) -> Units:
        """Unite the members of a family, which are treated alike, and return what stands for them."""
        if units.kind == "family":
            target, *rest = units.parts
            units.kind, units.parts, units.parent = "", (), target
            for part in rest:
                self.unite([target], [part])
        return units.root()

    def unstack(self, axes: Sequence[Axis], dim: int) -> list[list[list[Units]]] | None:
        """Return the other axes for each place along an axis of a stack, or None if the axis is none."""
        if len(axes[dim]) != 1:
            return None
        index = axes[dim][0].root()
        if index.kind:
            return None
        if index.whole is not None:
            _stack(index.whole.root(), index)
        rest = [[u.root() for u in axis] for place, axis in enumerate(axes) if place != dim]
        if not any(units.kind == "family" and units.index is index for axis in rest for units in axis):
            return None
        return [[[_member(units, index, n) for units in axis] for axis in rest] for n in range(index.size)]

    def cut_along(self, axes: Sequence[Axis], dim: int, sizes: Sequence[int]) -> list[list[list[Units]]]:
        """Return the axes of each of the consecutive pieces into which one axis is cut.

        Entries inside heads differ from piece to piece if nothing treated all heads alike so far, as in a projection that
        is divided into heads first, and into queries, keys and values then.
        """
        roots = [[units.root() for units in axis] for axis in axes]
        outer = roots[dim][0] if len(roots[dim]) == 1 else None
        inner = None if outer is None else next((u for axis in roots for u in axis if _is_inside(u, outer)), None)
        if outer is None or inner is None:
            return [[*roots[:dim], piece, *roots[dim + 1 :]] for piece in self.cut(axes[dim], sizes)]
        return [
            [piece if n == dim else [entries if u is inner else u for u in axis] for n, axis in enumerate(roots)]
            for piece, entries in self._runs(outer, inner, sizes)
        ]

    def _runs(self, outer: Units, inner: Units, sizes: Sequence[int]) -> list[tuple[list[Units], Units]]:
        """Return consecutive runs of heads, each with the entries inside them."""
        if len(sizes) == 1:
            return [([outer] if outer.size > 1 else [], inner)]
        if not outer.kind and inner.kind != "family" and outer.is_untouched and inner.is_untouched:
            _separate(outer, inner, sizes)
        if inner.kind != "family":
            return [(piece, inner) for piece in self.cut([outer], sizes)]
        # The heads of a stack are single.
        heads = outer.parts or [Units(1, fixed=True)] * outer.size
        totals = [part.size for part in heads]
        finest = _common([list(sizes), totals])
        terms = zip(heads, inner.parts, _grouped(finest, finest, totals), strict=True)
        runs = [run for part, entries, among in terms for run in self._runs(part.root(), entries.root(), among)]
        return [
            group[0] if len(group) == 1 else (concatenation([axis for axis, _ in group]), inner)
            for group in _grouped(runs, finest, sizes)
        ]

    def cut(self, axis: Axis, sizes: Sequence[int]) -> list[list[Units]]:
        """Cut an axis into consecutive pieces."""
        if len(sizes) == 1:
            return [list(axis)]
        outermost, *rest = factors(axis)
        run = length(rest)
        if any(size % run for size in sizes):
            self.fix(axis)
            return [fixed(size) for size in sizes]
        pieces = self._cut_units(outermost.root(), [size // run for size in sizes])
        return [[*piece, *rest] for piece in pieces]

    def _cut_units(self, units: Units, sizes: Sequence[int]) -> list[list[Units]]:
        if not units.kind and units.fixed and not units.name:
            # Places of an input, which no parameter has: their division concerns nobody, and may be deep.
            return [fixed(size) for size in sizes]
        if not units.kind:
            units.parts = tuple(map(units.part, sizes))
            units.kind = "sum"
            return [[part] for part in units.parts]
        if units.kind == "family":
            cuts = [self.cut([part], sizes) for part in units.parts]
            return [
                [_family(units, parts) for parts in zip(*pieces, strict=True)] for pieces in zip(*cuts, strict=True)
            ]
        pieces: list[list[Units]] = []
        remaining = [[part.root()] for part in units.parts]
        for size in sizes:
            block: list[list[Units]] = []
            while sum(map(length, block)) < size:
                missing = size - sum(map(length, block))
                head = remaining.pop(0)
                if length(head) > missing:
                    head, tail = self.cut(head, (missing, length(head) - missing))
                    remaining.insert(0, tail)
                block.append(head)
            pieces.append(concatenation(block) if block else [])
        return pieces

    def split(self, axis: Axis, lengths: Sequence[int]) -> list[list[Units]]:
        """Return the axes of the given lengths into which a reshape divides one axis."""
        remaining = [units.root() for units in axis]
        result: list[list[Units]] = []
        for size in lengths:
            block: list[Units] = []
            while length(block) < size:
                missing, rest = divmod(size, length(block))
                if not rest and self._expose(remaining, missing):
                    block.append(remaining.pop(0))
                    continue
                self.fix(axis)
                return [fixed(n) for n in lengths]
            result.append(block)
        return result

    def _expose(self, axis: list[Units], size: int) -> bool:
        """Refine an axis until its first units have a size that divides the given one; return whether that works."""
        while size % axis[0].size:
            if not self._refine(axis, 0 if axis[0].size % size else size):
                return False
        return True


def _family(like: Units, parts: Sequence[Units]) -> Units:
    return Units(parts[0].size, like.name, kind="family", parts=tuple(parts), index=like.index)


def _member(units: Units, index: Units, number: int) -> Units:
    return units.parts[number].root() if units.kind == "family" and units.index is index else units


def _stack(whole: Units, index: Units) -> None:
    """Make the product of an index and units inside it a concatenation, if nothing treated its parts alike so far."""
    if whole.kind != "product" or len(whole.parts) != 2 or whole.parts[0] is not index or not index.is_untouched:
        return
    inner = whole.parts[1]
    if inner.is_untouched:
        whole.kind, whole.parts = "sum", tuple(inner.copy() for _ in range(index.size))
        index.fixed = True
        _become_family(inner, whole.parts, index)


def _is_inside(units: Units, outer: Units) -> bool:
    """Return whether units are entries inside heads, all alike or run by run."""
    whole = None if outer.whole is None else outer.whole.root()
    if whole is not None and whole.kind == "product" and len(whole.parts) == 2:
        return whole.parts[0] is outer and whole.parts[1].root() is units
    return units.kind == "family" and units.index is outer


def _separate(outer: Units, inner: Units, sizes: Sequence[int]) -> None:
    """Make the product of heads and entries a concatenation of runs of heads, each with entries of its own."""
    whole = outer.whole.root() if outer.whole is not None else outer
    members = tuple(inner.copy() for _ in sizes)
    heads = tuple(outer.part(size) if size > 1 else Units(1, fixed=True) for size in sizes)
    runs = []
    for run, entries in zip(heads, members, strict=True):
        product = replace(whole.part(run.size * inner.size), kind="product", parts=(run, entries))
        run.whole = product
        runs.append(product if run.size > 1 else entries)
    whole.kind, whole.parts = "sum", tuple(runs)
    outer.kind, outer.parts = "sum", heads
    _become_family(inner, members, outer)


def _grouped(items: Sequence[_T], sizes: Sequence[int], totals: Sequence[int]) -> list[list[_T]]:
    """Return consecutive items in groups of which the sizes add to the totals."""
    borders = set(itertools.accumulate(totals))
    result: list[list[_T]] = [[]]
    for item, border in zip(items, itertools.accumulate(sizes), strict=True):
        result[-1].append(item)
        if border in borders:
            result.append([])
    return result[:-1]


def _become_family(units: Units, members: Sequence[Units], index: Units) -> None:
    for number, part in enumerate(units.parts):
        _become_family(part, [member.parts[number] for member in members], index)
    units.kind, units.parts, units.index = "family", tuple(members), index


def terms(units: Units) -> list[list[Units]]:
    """Return the finest concatenation of which units consist, each term as an axis."""
    root = units.root()
    if root.kind == "sum":
        return [term for part in root.parts for term in terms(part)]
    if root.kind == "product":
        outermost, *rest = factors([root])
        return [[*term, *rest] for term in terms(outermost)]
    return [[root]]


def _common(lists: list[list[int]]) -> list[int]:
    """Return the sizes of the coarsest division that refines all the given ones."""
    borders = sorted({border for sizes in lists for border in itertools.accumulate(sizes)})
    return [stop - start for start, stop in itertools.pairwise([0, *borders])]
