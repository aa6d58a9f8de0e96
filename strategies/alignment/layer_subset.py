"""A choice of a symmetry's spaces by layer; spaces that are left out stay as they are.

    mlp.*, heads.*        spaces whose names match any of these patterns
    first:6, last:2       spaces of the first six and the last two layers
    mlp.*, !mlp.0         an exclamation mark removes the spaces that match its pattern

A space's layer is the first number in its name, as in `heads.3`. A space without a number, such as the residual stream,
is chosen by its name alone. Every subset of a symmetry is a symmetry.
"""

import re
from dataclasses import replace
from fnmatch import fnmatchcase

from fedbasin.strategies.symmetry.symmetry import Space, Symmetry

_ENDS = re.compile(r"(?P<end>first|last):(?P<count>[1-9]\d*)")


class SubsetError(ValueError):
    """A choice of layers that does not fit the symmetry."""


def choose_layers(symmetry: Symmetry, chosen: str) -> Symmetry:
    """Restrict a symmetry to the spaces that `chosen` names; an empty choice keeps all of them.

    Raises:
        SubsetError: a part of `chosen` matches no space, or nothing is left.
    """
    terms = [term.strip() for term in chosen.split(",") if term.strip()]
    included = [_matching_names(symmetry, term) for term in terms if not term.startswith("!")]
    excluded = [_matching_names(symmetry, term[1:]) for term in terms if term.startswith("!")]
    names = set().union(*included) if included else {space.name for space in symmetry.spaces}
    names -= set().union(*excluded)
    if symmetry.spaces and not names:
        raise SubsetError(f"layers = {chosen!r} leaves no space; leave alignment off instead")
    return replace(symmetry, spaces=tuple(space for space in symmetry.spaces if space.name in names))


def layer_of(space: Space) -> int | None:
    """Return the layer number in a space's name, or None where the name has no number."""
    number = re.search(r"\d+", space.name)
    return int(number[0]) if number else None


def _matching_names(symmetry: Symmetry, term: str) -> set[str]:
    ends = _ENDS.fullmatch(term)
    if ends:
        names = _names_at_end(symmetry, ends["end"], int(ends["count"]))
    else:
        # Case counts: fnmatch would fold it on some systems, and one run would align other spaces on each.
        names = {space.name for space in symmetry.spaces if fnmatchcase(space.name, term)}
    if not names:
        few = ", ".join(space.name for space in symmetry.spaces[:6])
        raise SubsetError(
            f"layers: {term!r} matches no space of this model; its spaces are {few}"
            f"{' ...' if len(symmetry.spaces) > 6 else ''}. Write patterns of names, first:N or last:N"
        )
    return names


def _names_at_end(symmetry: Symmetry, end: str, count: int) -> set[str]:
    layers = sorted({layer for space in symmetry.spaces if (layer := layer_of(space)) is not None})
    selection = layers[:count] if end == "first" else layers[-count:]
    return {space.name for space in symmetry.spaces if layer_of(space) in selection}
