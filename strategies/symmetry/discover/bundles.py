"""Bundles: cells that move together, as a tree, and the spaces that they give.

Entries of a head may rotate differently in every head, so they depend on the heads; units of an expert depend on the
expert. A cell depends on another if it stands inside it wherever it appears. The tree of these dependencies is a
bundle, and with a kind of group for each of its leaves it is a space: `R(8,4)*O(8) wr S(4)` for heads.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedbasin.strategies.symmetry.discover.places import Place, UnwritableError, places
from fedbasin.strategies.symmetry.discover.repeats import with_repeats
from fedbasin.strategies.symmetry.discover.signs import Charge, solutions
from fedbasin.strategies.symmetry.discover.units import Units, leaves
from fedbasin.strategies.symmetry.discover.walk import STATISTICS, Record, Value
from fedbasin.strategies.symmetry.groups.block_groups import Inner, PairSigns, Rotary
from fedbasin.strategies.symmetry.groups.centred import Centred
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.groups.shared_heads import SharedHeads
from fedbasin.strategies.symmetry.symmetry import Axis, Space, SymmetryError
from fedbasin.strategies.symmetry.translation import Output, Shift

Kind = tuple[str, int]
"""A kind of group for a leaf, such as ("R", 4): its letter, and its stride or 0."""

STILL: Kind = ("1", 0)
ORDER: Kind = ("S", 0)


@dataclass(eq=False)
class Cell:
    """A node of a bundle.

    Attributes:
        units: the units of the cell.
        inside: the cells that depend on it.
        ends: the places whose innermost moving cell it is.
        shared: True if it numbers heads that share what lies beside it.
        signs: sets of places that may change their sign together, unit by unit.
        repeat: number of fixed units in each of which the cell stands by itself.
    """

    units: Units
    inside: list["Cell"] = field(default_factory=list)
    ends: list[Place] = field(default_factory=list)
    shared: bool = False
    signs: tuple[tuple[Place, ...], ...] = ()
    repeat: int = 1

    def all(self) -> list["Cell"]:
        """Return the cell and all inside it."""
        return [self, *(below for cell in self.inside for below in cell.all())]

    def kinds(self) -> list[Kind]:
        """Return the kinds of group that the cell may have, the largest first and the smallest last."""
        size = self.units.size
        if self.repeat > 1:
            return [("O", 0)]
        if self.units.is_fixed:
            halves = [(letter, stride) for letter in "RZ" for stride in dict.fromkeys((size // 2, 1))]
            order = halves if self.units.kind != "product" else [halves[1 % len(halves)], halves[0], *halves[2:]]
            return [*order, STILL] if size % 2 == 0 else [STILL]
        if self.inside:
            return [ORDER]
        turns: list[Kind] = []
        if not self.units.bent:
            turns = [("C", 0)] if self.units.averaged and size > 1 else [] if self.units.averaged else [("O", 0)]
        return [*turns, *([("B", 0)] if self.signs else []), ORDER]


def bundles(record: Record, aliases: Mapping[str, Sequence[str]]) -> "list[Bundle]":
    """Return the bundles of a model that was followed, after fixing what the notation cannot express."""
    while True:
        try:
            return _bundles(record, aliases)
        except UnwritableError as error:
            if error.units.is_fixed:
                raise SymmetryError(
                    f"the units of {error.units.name!r} stand in a structure that no symmetry of this package expresses"
                ) from error
            for leaf in error.units.leaves():
                leaf.fixed = True
                leaf.reason = leaf.reason if leaf.reason[0] else ("a structure that the notation cannot express", "")


def _bundles(record: Record, aliases: Mapping[str, Sequence[str]]) -> "list[Bundle]":
    everything = _with_outer_cells(list(places(record.parameters)), _batched(record))
    everything = _with_single_keys(everything, record.parameters)
    everything, repeats = with_repeats(everything, record.parameters)
    depends = _dependencies(everything)
    cells: dict[Units, Cell] = {units: Cell(units, repeat=repeats.get(units, 1)) for units in depends}
    roots = []
    for units, scope in sorted(depends.items(), key=lambda item: (item[0].number, len(item[1]))):
        if not scope:
            roots.append(units)
            continue
        parent = max(scope, key=lambda outer: len(depends[outer]))
        cells[parent].inside.append(cells[units])
    for place in everything:
        moving = [units for units in place.cells if units in cells]
        if moving and not moving[0].is_fixed:
            cells[moving[-1]].ends.append(place)
            _mark_shared(cells, moving)
    rows = record.signs.by_leaf()
    for units, cell in cells.items():
        if not units.is_fixed and not cell.inside:
            cell.signs = _signs(cell, rows.get(units, []), record.parameters)
    bundles = [Bundle(cells[units], aliases) for units in roots if any(c.ends for c in cells[units].all())]
    for bundle in bundles:
        bundle.space("space", {})
        bundle.space("space", {cell: cell.kinds()[0] for cell in bundle.leaves()})
    return bundles


def _batched(record: Record) -> dict[str, Value]:
    """Return the parameters that are multiplied matrix by matrix."""
    return {name: value for name, value in record.parameters.items() if value.charge in record.batched}


def _with_outer_cells(everything: list[Place], parameters: Mapping[str, Value]) -> list[Place]:
    """Return the places with the cells of batched dimensions in front of those inside them."""
    inside = _companions(everything, parameters)
    result, claimed = [], set()
    for place in everything:
        outer = inside.get((place.tensor, place.dim))
        if outer is None or (place.cells[:1] and place.cells[0].is_fixed):
            result.append(place)
            continue
        dim, units = outer
        if (place.tensor, dim) in claimed and any(
            p.tensor == place.tensor and p.dim != place.dim and p.outer == dim for p in result
        ):
            raise UnwritableError(place.cells[0])
        claimed.add((place.tensor, dim))
        result.append(replace(place, cells=(units, *place.cells), outer=dim))
    return [place for place in result if not ((place.tensor, place.dim) in claimed and place.outer is None)]


def _with_single_keys(everything: list[Place], parameters: Mapping[str, Value]) -> list[Place]:
    """Return the places with a cell of one key around heads that all share it.

    Such a key has no axis of its own: its entries stand alone in the projection of keys, and inside the heads elsewhere.
    """
    alone = {
        place.cells[0]
        for place in everything
        if len(place.cells) == 1 and sum(bool(axis) for axis in parameters[place.tensor].axes) > 1
    }
    # Groups of a convolution hold units of their own, which stand nowhere without them.
    groups = {
        p.cells[0] for p in everything if len(p.cells) == 2 and not p.cells[1].is_fixed and p.cells[1] not in alone
    }
    keys: dict[Units, Units] = {}
    for place in everything:
        if (
            len(place.cells) == 2
            and place.cells[1] in alone
            and not (place.cells[0].is_fixed or place.cells[0] in groups)
        ):
            heads, entries = place.cells
            if entries.is_fixed or not entries.bent:
                key = keys.setdefault(heads, Units(1, heads.name, outer=True, number=heads.number))
                keys.setdefault(entries, key)
    return [
        replace(place, cells=(around, *place.cells)) if (around := _key_of(place, keys)) else place
        for place in everything
    ]


def _key_of(place: Place, keys: Mapping[Units, Units]) -> Units | None:
    return next((keys[cell] for cell in place.cells if cell in keys), None)


def _companions(everything: list[Place], parameters: Mapping[str, Value]) -> dict[tuple[str, int], tuple[int, Units]]:
    """Return for each axis the dimension on which its units depend, with the units of that dimension.

    A unit inside batched products depends on the batch if no tensor has the unit without the batch.
    """
    single = {
        (name, dim): axis[0].root()
        for name, value in parameters.items()
        for dim, axis in enumerate(value.axes)
        if len(axis) == 1 and axis[0].root().outer and not axis[0].root().kind and not axis[0].root().fixed
    }
    seen: dict[Units, list[set[Units]]] = defaultdict(list)
    for place in everything:
        companions = {u for (name, dim), u in single.items() if name == place.tensor and dim != place.dim}
        for cell in place.cells:
            seen[cell].append(companions)
    result = {}
    for place in everything:
        outermost = place.cells[0] if place.cells else None
        if outermost is None or outermost.is_fixed:
            continue
        common = set.intersection(*seen[outermost]) - {outermost}
        for (name, dim), units in single.items():
            if name == place.tensor and dim != place.dim and units in common:
                result[place.tensor, place.dim] = (dim, units)
    return result


def _dependencies(everything: Iterable[Place]) -> dict[Units, set[Units]]:
    """Return for every cell that may move the cells on which it may depend.

    Raises:
        UnwritableError: a cell stands inside another on which it cannot depend.
    """
    scopes: dict[Units, set[Units]] = {}
    inner: list[tuple[Units, Units]] = []
    for place in everything:
        cells = [units for units in place.cells if units.size > 1 or units.outer]
        for number, units in enumerate(cells):
            if units.is_fixed and not number:
                continue
            scope = set(cells[:number])
            scopes[units] = scopes.get(units, scope) & scope
            if number:
                inner.append((units, cells[number - 1]))
    moving = {units: scope for units, scope in scopes.items() if not units.is_fixed}
    for units, around in inner:
        if units.is_fixed or around in moving.get(units, set()):
            continue
        if not scopes[units] & {around} and not _shares(around, units, moving):
            raise UnwritableError(units)
    # A node of fixed entries may turn inside what moves, if it appears there more than once.
    turning = {
        units: scope
        for units, scope in scopes.items()
        if units.is_fixed and scope and scope <= moving.keys() and sum(u is units for u, _ in inner) > 1
    }
    return {**moving, **turning}


def _shares(heads: Units, entries: Units, moving: Mapping[Units, set[Units]]) -> bool:
    """Return whether heads and the entries inside them depend on the same cells, as heads that share a key do."""
    return heads in moving and bool(moving[heads]) and moving[heads] == moving[entries]


def _mark_shared(cells: Mapping[Units, Cell], moving: list[Units]) -> None:
    if len(moving) == 3 and cells[moving[2]] not in cells[moving[1]].inside:
        cells[moving[1]].shared = True
    elif len(moving) > 3:
        raise UnwritableError(next(units for units in reversed(moving) if not units.is_fixed))


def _signs(
    cell: Cell, rows: Iterable[tuple[Charge, ...]], parameters: Mapping[str, Value]
) -> tuple[tuple[Place, ...], ...]:
    charges = {place: charge_of(cell, place, parameters) for place in cell.ends}
    gains = [charge for place, charge in charges.items() if _is_gain(place.tensor, parameters[place.tensor])]
    chosen: list[frozenset[Charge]] = []
    for element in solutions(rows, list(dict.fromkeys(charges.values())), gains):
        if element and not any(element & rival for rival in chosen):
            chosen.append(frozenset(element))
    return tuple(tuple(place for place, charge in charges.items() if charge in element) for element in chosen)


def charge_of(cell: Cell, place: Place, parameters: Mapping[str, Value]) -> Charge:
    """Return the charge of a tensor on the units of a cell, at one of several places of an axis."""
    ahead = Counter(leaves(place.before))
    return parameters[place.tensor].charge, ahead[cell.units]


def _is_gain(name: str, value: Value) -> bool:
    return sum(bool(axis) for axis in value.axes) == 1 and not name.endswith("bias")


@dataclass(frozen=True, eq=False)
class Bundle:
    """A tree of cells that gives one space."""

    root: Cell
    aliases: Mapping[str, Sequence[str]]

    @property
    def name(self) -> str:
        """The module that first writes the outermost units."""
        return self.root.units.name

    def leaves(self) -> list[Cell]:
        """Return the cells whose kind of group is to be chosen."""
        return [cell for cell in self.root.all() if len(cell.kinds()) > 1]

    def places(self) -> list[Place]:
        """Return every place of the bundle."""
        return [place for cell in self.root.all() for place in cell.ends]

    def shifts(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Shift]:
        """Return the biases inside heads to which any vector might be added, as attention allows it."""
        return [shift for cell in self.root.all()[1:] for shift in _shifts(cell, shapes)]

    def space(self, name: str, kinds: Mapping[Cell, Kind], silent: Iterable[Shift] = ()) -> Space:
        """Return the space with the given kinds of groups; other cells have their smallest.

        Args:
            name: name of the space.
            kinds: kinds of groups by their cells.
            silent: shifts; a bias that moves freely does not count in matching.
        """
        group, roles = self._group(self.root, kinds)
        axes = [
            Axis(alias, place.dim, place.part, role, _counts(alias, place, silent), place.period, place.outer)
            for place, role in roles
            for alias in self.aliases[place.tensor]
        ]
        return Space(name, _outermost(group), tuple(axes))

    def _group(self, cell: Cell, kinds: Mapping[Cell, Kind]) -> tuple[Inner, list[tuple[Place, int]]]:
        """Return the group of a cell, and the role of each place below it."""
        kind = kinds.get(cell, cell.kinds()[-1])
        if not cell.inside:
            return _leaf_group(cell, kind)
        inners: list[Inner] = []
        roles: list[tuple[Place, int]] = []
        still = list(cell.ends)
        heads = next((c for c in cell.inside if c.shared), None)
        if heads is not None:
            still += heads.ends
            if heads.inside:
                raise UnwritableError(heads.units)
        shared: list[tuple[Inner, list[tuple[Place, int]], Cell]] = []
        for child in cell.inside:
            if child is heads:
                continue
            if kinds.get(child, child.kinds()[-1]) == STILL:
                still += child.ends
                continue
            inner, below = self._group(child, kinds)
            if heads is not None and any(heads.units in place.cells for place, _ in below):
                shared.append((inner, below, child))
                continue
            roles += [(place, _width(inners) + role) for place, role in below]
            inners.append(inner)
        if heads is not None:
            inners, more = _share(inners, shared, heads, still)
            roles += more
            still = []
        if still:
            roles += [(place, _width(inners)) for place in still]
            inners.append(Permutation(1))
        return Wreath(tuple(inners), cell.units.size), roles


def _counts(alias: str, place: Place, silent: Iterable[Shift]) -> bool:
    return not alias.endswith(STATISTICS) and not any(
        alias == shift.bias and place.part == shift.part and shift.output is None for shift in silent
    )


def _shifts(cell: Cell, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Shift]:
    """Yield the shifts of the biases that write the entries of heads: of values if a projection reads the entries."""
    writers = {_layer(place.tensor) for place in cell.ends if len(shapes[place.tensor]) == 1}
    outputs = [
        Output(place.tensor, place.dim, f"{_layer(place.tensor)}.bias")
        for place in cell.ends
        if _layer(place.tensor) not in writers and len(shapes[place.tensor]) == 2 and place.part is None
    ]
    for place in cell.ends:
        if len(shapes[place.tensor]) == 1 and place.tensor.endswith("bias"):
            if not outputs:
                yield Shift(place.tensor, place.part, place.period)
            elif outputs[0].bias in shapes:
                yield Shift(place.tensor, place.part, place.period, outputs[0])


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _share(
    inners: list[Inner], shared: list[tuple[Inner, list[tuple[Place, int]], Cell]], heads: Cell, still: list[Place]
) -> tuple[list[Inner], list[tuple[Place, int]]]:
    """Return the groups with that of heads which share a key and a value, and the roles of their places."""
    singles = sum(len(inner.widths) for inner, _, _ in shared)
    resting = [place for place in still if heads.units in place.cells]
    start, roles, offset = _width(inners), [], 0
    for inner, below, _ in shared:
        for place, role in below:
            copies = singles + bool(resting) if heads.units in place.cells else 0
            roles.append((place, start + offset + role + copies))
        offset += len(inner.widths)
    groups = tuple(inner for inner, _, _ in shared)
    if resting:
        # Entries that rest in shared heads still follow the order of the heads.
        groups = (*groups, Permutation(1))
        alone = [place for place in still if place not in resting]
        if not alone:
            raise UnwritableError(heads.units)
        roles += [(place, start + singles) for place in alone]
        roles += [(place, start + 2 * singles + 1) for place in resting]
        return [*inners, SharedHeads(groups, heads.units.size)], roles
    result: list[Inner] = [*inners, SharedHeads(groups, heads.units.size)]
    if still:
        roles += [(place, start + 2 * singles) for place in still]
        result.append(Permutation(1))
    return result, roles


def _leaf_group(cell: Cell, kind: Kind) -> tuple[Inner, list[tuple[Place, int]]]:
    letter, stride = kind
    size = cell.units.size
    if letter == "B":
        return _signed(cell)
    if cell.repeat > 1:
        return Orthogonal(size, cell.repeat), [(place, 0) for place in cell.ends]
    groups = {"S": Permutation, "O": Orthogonal, "C": Centred}
    strided = {"R": Rotary, "Z": PairSigns}
    inner: Inner = groups[letter](size) if letter in groups else strided[letter](size, stride)
    return inner, [(place, 0) for place in cell.ends]


def _signed(cell: Cell) -> tuple[Inner, list[tuple[Place, int]]]:
    """Return permutations with signs, which have a role for each set of tensors that change their sign together."""
    numbers: dict[int, int] = {}
    inners: list[Inner] = []
    roles = []
    for place in cell.ends:
        pattern = next((n for n, signed in enumerate(cell.signs) if place in signed), -1)
        if pattern not in numbers:
            numbers[pattern] = len(inners)
            inners.append(Permutation(1) if pattern < 0 else Orthogonal(1))
        roles.append((place, numbers[pattern]))
    return Wreath(tuple(inners), cell.units.size), roles


def _width(inners: Iterable[Inner]) -> int:
    return sum(len(inner.widths) for inner in inners)


def _outermost(inner: Inner) -> Group:
    if isinstance(inner, Permutation | Orthogonal | Centred | Wreath):
        return inner
    return Wreath((inner,), 1)
