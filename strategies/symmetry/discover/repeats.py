"""Entries inside units that keep their order, as those of heads with a bias of their own on positions (ALiBi).

Such heads cannot change places, but the entries of each may rotate by themselves: `O(8)^4` for four heads. The parts of
an axis, one for each head, are then one place again.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedbasin.strategies.symmetry.discover.places import Place
from fedbasin.strategies.symmetry.discover.units import Units, length
from fedbasin.strategies.symmetry.discover.walk import Value


def with_repeats(
    everything: Sequence[Place], parameters: Mapping[str, Value]
) -> tuple[list[Place], Mapping[Units, int]]:
    """Return the places, in which entries inside fixed units stand once, and how often each of these repeats.

    Args:
        everything: the places, with a part for each of the fixed units.
        parameters: the tensors.
    """
    around: dict[Units, list[set[Units]]] = defaultdict(list)
    for place in everything:
        for units in place.cells:
            alone = len(place.cells) == 1 and place.period is None and place.outer is None
            around[units].append({outer for outer, _ in place.rows} if alone and len(place.rows) == 1 else set())
    inside = {
        units: set.intersection(*outers)
        for units, outers in around.items()
        if not (units.kind or units.fixed or units.bent or units.averaged)
    }
    groups: dict[tuple[object, ...], list[Place]] = defaultdict(list)
    for place in everything:
        if place.cells and inside.get(place.cells[0]):
            groups[place.tensor, place.dim, place.cells, place.before].append(place)
    merged = {
        id(parts[0]): _merged(parts, length(parameters[parts[0].tensor].axes[parts[0].dim]))
        for parts in groups.values()
    }
    torn = {parts[0].cells[0] for parts in groups.values() if merged[id(parts[0])] is None}
    repeats = {units: next(iter(outer)).size for units, outer in inside.items() if outer and units not in torn}
    kept = [place for place in everything if not (place.cells and place.cells[0] in repeats)]
    return kept + [place for place in merged.values() if place is not None and place.cells[0] in repeats], repeats


def _merged(parts: Sequence[Place], total: int) -> Place | None:
    """Return the parts of an axis as one place, or None if they do not follow each other at equal distances."""
    stretches = [place.part for place in parts if place.part is not None]
    outer = parts[0].rows[0][0]
    if len(stretches) < 2 or len(stretches) != outer.size:
        return None
    (start, stop), step = stretches[0], stretches[1][0] - stretches[0][0]
    if stretches != [(start + step * row, stop + step * row) for row in range(outer.size)]:
        return None
    if step == stop - start:
        whole = stop - start == total // outer.size and not total % outer.size
        return replace(parts[0], part=None if whole else (start, stretches[-1][1]))
    return replace(parts[0], part=(start, stop), period=step) if step * outer.size == total and stop <= step else None
