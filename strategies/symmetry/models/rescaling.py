"""Scales beside orders and rotations: a symmetry's groups enlarged by a positive number for each unit or head.

    (q, k) -> (a q, k / a),    (v, o) -> (a v, o / a),    relu(a z) / a = relu(z)      for a > 0

Queries against keys and values against outputs always allow it (the rescaling of Zhang et al. 2025, arXiv 2502.00264);
hidden units do where what lies between is homogeneous: ReLU, LeakyReLU, max-pooling, or nothing, as between the two
linear branches of a gated unit. By their measurements it gains next to nothing in matching, so no family has it. It
comes after norms, never around them.
"""

from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import accumulate

from fedbasin.strategies.symmetry.groups.block_groups import Inner
from fedbasin.strategies.symmetry.groups.general_linear import Conformal, Positive
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.symmetry import Member, Site, Symmetry, SymmetryError


def rescaled(symmetry: Symmetry, sites: str, *divided: str) -> Symmetry:
    """The symmetry with a scale on every leg that has a member to divide by it; prove it with `check`.

    `S(n)` becomes `P(1) wr S(n)`, and `O(d)` inside a product `CO(d)`. The other members of the leg are multiplied.

    Args:
        symmetry: orders and rotations.
        sites: a pattern of the sites that stretch; the residual stream never does.
        divided: patterns of the tensors that are divided: keys, output projections, what reads units.

    Raises:
        SymmetryError: a leg has nothing to multiply, or its group cannot stretch.
    """
    found = tuple(
        _rescaled(site, divided) if fnmatchcase(site.name, sites) else site
        for site in symmetry.sites
    )
    return replace(symmetry, sites=found)


def _rescaled(site: Site, divided: tuple[str, ...]) -> Site:
    inverse = {member for member in site.members if _matches(member, divided)}
    legs = {member.leg for member in inverse}
    if not legs:
        return site
    for leg in legs:
        if all(member in inverse for member in site.members if member.leg == leg):
            raise SymmetryError(
                f"site {site.name!r}: all members of leg {leg} would be divided and none multiplied; "
                "give patterns of one side only"
            )
    return _moved(replace(site, group=_stretched(site, legs)), legs, inverse)


def _matches(member: Member, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(member.tensor, pattern) for pattern in patterns)


def _stretched(site: Site, legs: set[int]) -> Group:
    group = site.group
    if isinstance(group, Permutation):
        return Wreath((Positive(1),), group.count)
    if not isinstance(group, Wreath) or len(group.inners) != len(group.sizes):
        raise SymmetryError(f"site {site.name!r}: {group} cannot stretch; write the group as text")
    inners = (
        _stretching(site, inner) if leg in legs else inner for leg, inner in enumerate(group.inners)
    )
    return Wreath(tuple(inners), group.count)


def _stretching(site: Site, inner: Inner) -> Inner:
    if isinstance(inner, Orthogonal):
        return Conformal(inner.size)
    if inner == Permutation(1):
        return Positive(1)
    raise SymmetryError(f"site {site.name!r}: {inner} cannot stretch; write the group as text")


def _moved(site: Site, legs: set[int], inverse: set[Member]) -> Site:
    """The members on the legs of the larger group, where a dual leg follows each that stretches."""
    last = max(member.leg for member in site.members)
    before = list(accumulate((1 + (leg in legs) for leg in range(last + 1)), initial=0))
    return replace(
        site,
        members=tuple(
            replace(member, leg=before[member.leg] + (member in inverse)) for member in site.members
        ),
    )
