"""A part of a symmetry, chosen by layer: what is left out stays as it is.

    mlp.*, heads.*        sites whose names match any of these patterns
    first:6, last:2       sites of the first six and the last two layers
    mlp.*, !mlp.0         without those that match a pattern behind an exclamation mark

A site's layer is the first number in its name, `heads.3`; a site without one, such as the residual stream, is
chosen by its name alone. Every subset of a symmetry is a symmetry.
"""

import re
from dataclasses import replace
from fnmatch import fnmatchcase

from fedbasin.strategies.symmetry.symmetry import Site, Symmetry

_ENDS = re.compile(r"(?P<end>first|last):(?P<count>[1-9]\d*)")


class SubsetError(ValueError):
    """A choice of layers that does not fit the symmetry."""


def choose_layers(symmetry: Symmetry, chosen: str) -> Symmetry:
    """The sites that `chosen` names, in the symmetry's order; all of them where it is empty.

    Raises:
        SubsetError: a part of `chosen` matches no site, or nothing is left.
    """
    terms = [term.strip() for term in chosen.split(",") if term.strip()]
    wanted = [_matching(symmetry, term) for term in terms if not term.startswith("!")]
    unwanted = [_matching(symmetry, term[1:]) for term in terms if term.startswith("!")]
    names = set().union(*wanted) if wanted else {site.name for site in symmetry.sites}
    names -= set().union(*unwanted)
    if symmetry.sites and not names:
        raise SubsetError(f"layers = {chosen!r} leaves no site; leave alignment off instead")
    return replace(symmetry, sites=tuple(site for site in symmetry.sites if site.name in names))


def layer_of(site: Site) -> int | None:
    """The layer that a site belongs to, by its name; None where it has no number."""
    number = re.search(r"\d+", site.name)
    return int(number[0]) if number else None


def _matching(symmetry: Symmetry, term: str) -> set[str]:
    ends = _ENDS.fullmatch(term)
    if ends:
        names = _at_an_end(symmetry, ends["end"], int(ends["count"]))
    else:
        names = {site.name for site in symmetry.sites if fnmatchcase(site.name, term)}
    if not names:
        few = ", ".join(site.name for site in symmetry.sites[:6])
        raise SubsetError(
            f"layers: {term!r} matches no site of this model; its sites are {few}"
            f"{' ...' if len(symmetry.sites) > 6 else ''}. Write patterns of names, first:N or last:N"
        )
    return names


def _at_an_end(symmetry: Symmetry, end: str, count: int) -> set[str]:
    layers = sorted({layer for site in symmetry.sites if (layer := layer_of(site)) is not None})
    kept = layers[:count] if end == "first" else layers[-count:]
    return {site.name for site in symmetry.sites if layer_of(site) in kept}
