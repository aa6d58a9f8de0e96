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
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError


def rescaled(symmetry: Symmetry, spaces: str, *divided: str) -> Symmetry:
    """The symmetry with a scale on every role that has an axis to divide by it; prove it with `check`.

    `S(n)` becomes `P(1) wr S(n)`, and `O(d)` inside a product `CO(d)`. The other axes of the role are multiplied.

    Args:
        symmetry: orders and rotations.
        spaces: a pattern of the spaces that stretch; the residual stream never does.
        divided: patterns of the tensors that are divided: keys, output projections, what reads units.

    Raises:
        SymmetryError: a role has nothing to multiply, or its group cannot stretch.
    """
    found = tuple(
        _rescaled(space, divided) if fnmatchcase(space.name, spaces) else space
        for space in symmetry.spaces
    )
    return replace(symmetry, spaces=found)


def _rescaled(space: Space, divided: tuple[str, ...]) -> Space:
    inverse = {axis for axis in space.axes if _matches(axis, divided)}
    roles = {axis.role for axis in inverse}
    if not roles:
        return space
    for role in roles:
        if all(axis in inverse for axis in space.axes if axis.role == role):
            raise SymmetryError(
                f"space {space.name!r}: all axes of role {role} would be divided and none multiplied; "
                "give patterns of one side only"
            )
    return _moved(replace(space, group=_stretched(space, roles)), roles, inverse)


def _matches(axis: Axis, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(axis.tensor, pattern) for pattern in patterns)


def _stretched(space: Space, roles: set[int]) -> Group:
    group = space.group
    if isinstance(group, Permutation):
        return Wreath((Positive(1),), group.count)
    if not isinstance(group, Wreath) or len(group.inners) != len(group.sizes):
        raise SymmetryError(
            f"space {space.name!r}: {group} cannot stretch; write the group as text"
        )
    inners = (
        _stretching(space, inner) if role in roles else inner
        for role, inner in enumerate(group.inners)
    )
    return Wreath(tuple(inners), group.count)


def _stretching(space: Space, inner: Inner) -> Inner:
    if isinstance(inner, Orthogonal):
        return Conformal(inner.size)
    if inner == Permutation(1):
        return Positive(1)
    raise SymmetryError(f"space {space.name!r}: {inner} cannot stretch; write the group as text")


def _moved(space: Space, roles: set[int], inverse: set[Axis]) -> Space:
    """The axes on the roles of the larger group, where a dual role follows each that stretches."""
    last = max(axis.role for axis in space.axes)
    before = list(accumulate((1 + (role in roles) for role in range(last + 1)), initial=0))
    return replace(
        space,
        axes=tuple(
            replace(axis, role=before[axis.role] + (axis in inverse)) for axis in space.axes
        ),
    )
