"""Signs that a model allows on its units, by linear algebra over the field of two elements.

If one unit changes its sign in some tensors, every value of the model either changes it too (charge 1) or not (charge
0). Sums need equal charges, products add them, odd functions keep them, even functions and all that is not odd need or
return 0. The charges of a unit's tensors are therefore the solutions of a linear system, which is recorded while the
model is followed and solved for each set of units.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fedbasin.strategies.symmetry.discover.units import Axis, Units, leaves

Charge = tuple[int, int]
"""The charge of a value on some units: its number, and which of several equal units along an axis is meant."""


@dataclass
class Signs:
    """The equations between the charges of all values; a value is denoted by a number."""

    count: int = 0
    equations: list[tuple[Axis, tuple[int, ...], Axis]] = field(default_factory=list)

    def new(self) -> int:
        """Return the number of a value that no equation concerns yet."""
        self.count += 1
        return self.count

    def add(self, axes: Iterable[Axis], *values: int) -> None:
        """Require that the charges of the values add to 0 on all units along the axes."""
        self.equations += [(axis, values, ()) for axis in axes if axis]

    def add_part(self, axis: Axis, before: Axis, whole: int, part: int) -> None:
        """Require that a part of a value has its charge on an axis, before which other units stand in the whole."""
        self.equations.append((axis, (part, whole), before))

    def by_leaf(self) -> dict[Units, list[tuple[Charge, ...]]]:
        """Return the equations by the leaves that they concern, each of them once."""
        result: dict[Units, dict[tuple[Charge, ...], None]] = defaultdict(dict)
        for axis, values, preceding in self.equations:
            ahead = Counter(leaves(preceding))
            seen: Counter[Units] = Counter()
            for leaf in leaves(axis):
                if not leaf.fixed:
                    number = seen[leaf]
                    *rest, whole = values
                    terms = (*((value, number) for value in rest), (whole, number + ahead[leaf]))
                    result[leaf][terms] = None
                    seen[leaf] += 1
        return {leaf: list(rows) for leaf, rows in result.items()}


def solutions(
    rows: Iterable[tuple[Charge, ...]], values: Sequence[Charge], gains: Sequence[Charge]
) -> list[set[Charge]]:
    """Return a basis of the charges that values may have, each element as the values that change their sign.

    Args:
        rows: equations on the charges.
        values: the values of interest.
        gains: those among them that should not change their sign.
    """
    system = _System()
    for row in [*rows, *((gain,) for gain in gains)]:
        system.add(row)
    expressions = {value: system.pivots.get(value, {value}) for value in values}
    free = dict.fromkeys(unknown for expression in expressions.values() for unknown in sorted(expression))
    return [{value for value, expression in expressions.items() if unknown in expression} for unknown in free]


@dataclass
class _System:
    """Pivots, each as the set of free unknowns to which it is equal."""

    pivots: dict[Charge, set[Charge]] = field(default_factory=dict)
    users: dict[Charge, set[Charge]] = field(default_factory=lambda: defaultdict(set))

    def add(self, row: Iterable[Charge]) -> None:
        terms: set[Charge] = set()
        for unknown in row:
            terms ^= self.pivots.get(unknown, {unknown})
        if not terms:
            return
        # The latest unknown is expressed by earlier ones, so that parameters, which come early, stay free.
        pivot = max(terms)
        expression = terms - {pivot}
        for user in self.users.pop(pivot, set()):
            self._assign(user, (self.pivots[user] - {pivot}) ^ expression)
        self._assign(pivot, expression)

    def _assign(self, pivot: Charge, expression: set[Charge]) -> None:
        for unknown in self.pivots.get(pivot, set()) - expression:
            self.users[unknown].discard(pivot)
        self.pivots[pivot] = expression
        for unknown in expression:
            self.users[unknown].add(pivot)
