"""Where models lie and what aligning did to them, from the weights alone.

    cosine      <a - anchor, b - anchor> / (||a - anchor|| ||b - anchor||)
    gain        (<anchor, after> - <anchor, before>) / (||anchor|| ||before||)
    skew ratio  ||M - M^T|| / ||M||, with M the agreement of anchor and client units at a space

`M` is symmetric and positive at the best rotation, so the skew ratio after aligning says how well that worked,
and before aligning how far the client has turned. Clients that took a single SGD step from the anchor have none.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry
from fedbasin.strategies.symmetry.transform import Transform
from fedbasin.strategies.tensors.state import State, floating

Angles = Float[Tensor, "count size"]


@dataclass(frozen=True)
class SpaceGeometry:
    """What aligning did to one space; distances are over the parts of tensors that it matches by.

    Attributes:
        space: its name.
        distance_before: Euclidean, client to anchor.
        distance_after: the same after alignment.
        fixed_points: share of the units that stayed in their place.
        largest_angle: of all rotations in the space, radians from 0 to pi; 0 where units only change places.
        skew_before: skew ratio of client and anchor, 0 to 2.
        skew_after: the same after alignment; near 0 where a rotation was found exactly.
    """

    space: str
    distance_before: float
    distance_after: float
    fixed_points: float
    largest_angle: float
    skew_before: float
    skew_after: float


def space_geometry(
    transform: Transform, anchor: State, before: State, after: State
) -> tuple[SpaceGeometry, ...]:
    """The geometry of every space of an alignment, in the symmetry's order.

    Args:
        transform: what the alignment found.
        anchor: what was aligned to.
        before: the client as it was.
        after: the client under the transform.
    """
    return tuple(
        _describe(space, transform.elements[space.name], anchor, before, after)
        for space in transform.symmetry.spaces
    )


def _describe(
    space: Space, element: Element, anchor: State, before: State, after: State
) -> SpaceGeometry:
    return SpaceGeometry(
        space=space.name,
        distance_before=space_distance(space, anchor, before),
        distance_after=space_distance(space, anchor, after),
        fixed_points=fixed_points(element),
        largest_angle=largest_angle(element) or 0.0,
        skew_before=skew_ratio(space, anchor, before),
        skew_after=skew_ratio(space, anchor, after),
    )


def cosine(anchor: State, a: State, b: State) -> float:
    """Cosine of two clients' updates; zero where one of them has not moved."""
    ours, theirs = _updates(anchor, a), _updates(anchor, b)
    scale = _norm(ours.values()) * _norm(theirs.values())
    return _inner(ours, theirs) / scale if scale else 0.0


def alignment_gain(symmetry: Symmetry, anchor: State, before: State, after: State) -> float:
    """Rise of the inner product with the anchor, over the tensors that count in matching.

    Law: `(||before - anchor||^2 - ||after - anchor||^2) / (2 ||anchor|| ||before||)`, as a transform keeps
    norms; never negative for a matched client.
    """
    names = {axis.tensor for space in symmetry.spaces for axis in space.scored}
    ours, old, new = ({n: state[n].double() for n in names} for state in (anchor, before, after))
    scale = _norm(ours.values()) * _norm(old.values())
    return (_inner(ours, new) - _inner(ours, old)) / scale if scale else 0.0


def space_distance(space: Space, a: State, b: State) -> float:
    """Euclidean distance of the parts of tensors that a space matches by, each counted once."""
    parts: dict[tuple[str, tuple[int, int] | None], Axis] = {
        (m.tensor, m.part): m for m in space.scored
    }
    return _norm(m.view(a[n]).double() - m.view(b[n]).double() for (n, _), m in parts.items())


def fixed_points(element: Element) -> float:
    """Share of units in their place; blocks that are rotated count whole, by where the block is."""
    home = (element.order == torch.arange(len(element.order))).double()
    inner = [_unmoved(blocks) for blocks in element.blocks if blocks is not None]
    shares = torch.stack([share.cpu() for share in inner]).mean(0) if inner else torch.ones(())
    return float((home * shares).mean())


def _unmoved(blocks: Float[Tensor, "count size size"]) -> Float[Tensor, " count"]:
    """For each block the share of its units that an inner permutation leaves."""
    if not ((blocks == 0) | (blocks == 1)).all():
        return torch.ones(len(blocks), dtype=torch.float64)
    return blocks.diagonal(dim1=-2, dim2=-1).double().mean(-1)


def largest_angle(element: Element) -> float | None:
    """Of all rotations in the element, radians from 0 to pi; None where units only change places."""
    return max((float(angles.max()) for angles in rotation_angles(element)), default=None)


def rotation_angles(element: Element) -> list[Angles]:
    """The angles by which the blocks turn, for each role that has rotations.

    An orthogonal map turns planes by angles, the arguments of its eigenvalues: each plane's angle stands twice,
    a direction that stays has 0 and one that is reflected has pi. Radians, ascending.
    """
    return [_angles(b) for b in element.blocks if b is not None and not ((b == 0) | (b == 1)).all()]


def _angles(blocks: Float[Tensor, "count size size"]) -> Angles:
    # An orthogonal map is normal: its symmetric part has the cosines, at a tenth of the cost of its eigenvalues.
    symmetric = (blocks.double() + blocks.double().mT) / 2
    return torch.linalg.eigvalsh(symmetric).clamp(-1, 1).acos().sort(-1).values


def skew_ratio(space: Space, anchor: State, client: State) -> float:
    """How far the agreement of anchor and client at a space is from symmetric: 0 to 2, all roles together."""
    return skew([_agreement(space, role, anchor, client) for role in range(len(space.group.sizes))])


def skew(scores: Sequence[Tensor]) -> float:
    """`||M - M^T|| / ||M||` of the agreements M of all roles, as the space's group keeps them."""
    # A group that stretches keeps squared norms beside M.
    scores = [score[..., : score.shape[-2]] for score in scores]
    size = _norm(scores)
    return _norm(score - _transposed(score) for score in scores) / size if size else 0.0


def _agreement(space: Space, role: int, anchor: State, client: State) -> Tensor:
    """M of one role, as its group keeps it."""
    width = space.width(role)
    rows = (
        (axis.rows(anchor[axis.tensor], width), axis.rows(client[axis.tensor], width))
        for axis in space.scored
        if axis.role == role
    )
    terms = (space.group.score(ours.double(), theirs.double(), role) for ours, theirs in rows)
    return sum(terms, torch.zeros((), dtype=torch.float64))


def _transposed(score: Tensor) -> Tensor:
    """The transpose of M where blocks have axes of their own, `[block, block, unit, unit]`."""
    return score.mT if score.ndim < 4 else score.permute(1, 0, 3, 2)


def _updates(anchor: State, state: State) -> dict[str, Tensor]:
    shared = (name for name in floating(anchor) if name in state)
    return {name: state[name].double() - anchor[name].double() for name in shared}


def _inner(a: State, b: State) -> float:
    return math.fsum(float((tensor * b[name]).sum()) for name, tensor in a.items() if name in b)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors))
