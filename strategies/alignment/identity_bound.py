"""Proof, in one pass over the weights, that the best permutation is the identity.

Let `x_i` be all that the anchor's unit i reads and writes, `d_i` the client's change of it, and
`r_i = min_j ||x_i - x_j|| / 2` the unit's identity radius. If `||d_i|| < r_i` for every unit, then any
displaced unit costs more than it saves,

    ||x_i - (x_j + d_j)|| >= ||x_i - x_j|| - ||d_j|| > ||d_j||      for i != j

so the identity is the unique optimum of the assignment. Where blocks may also turn, as heads do, the same holds
of their order with `min_g ||x_i - g x_j||` for `||x_i - x_j||`: what is left is to turn every block in its place.
The radii depend on the anchor alone: they are computed once per round and sent along, and a client that trained
from the anchor pays one norm.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.symmetry.groups.groups import Permutation, Wreath
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry
from fedbasin.strategies.tensors.parallel import one_core
from fedbasin.strategies.tensors.state import State

Radii = Mapping[str, Float[Tensor, " units"]]

Drifts = Mapping[Axis, Float[Tensor, " blocks"]]
"""Of every tensor at a space, what the client changed in each unit, or block of units, squared."""

# A radius that rounding could have made too large proves nothing.
_SLACK = 1 - 1e-4

# Units compared at a time, so that memory does not grow with the square of the width.
_ROWS = 1024

# Width of a role beyond which blocks are not compared: the score of all with all is held at once.
_WIDEST = 8192

# Sums in double are exact to this share.
_DOUBT = 1e-9

# Units whose drift is measured at a time, so that their change stays in the cache.
_PIECE = 256


def identity_radii(symmetry: Symmetry, anchor: State) -> dict[str, Tensor]:
    """The identity radius of every unit or block that may change places, by space name.

    Spaces without a proof are left out: where a tensor has the space on two axes, where elements stretch, and where
    blocks are too wide to be compared.
    """
    radii = {}
    for space in symmetry.spaces:
        if isinstance(space.group, Permutation) and not space.quadratic:
            radii[space.name] = _half_separation(_units(space, anchor))
        elif isinstance(space.group, Wreath) and not space.quadratic and _is_provable(space.group):
            radii[space.name] = _half_separation_of_blocks(space, space.group, anchor)
    return radii


def drifts_of(space: Space, anchor: State, client: State) -> Drifts:
    """What the client changed at a space, tensor by tensor."""
    with one_core():
        return {axis: _drift(axis, space, anchor, client) for axis in space.scored}


def is_certified(space: Space, drifts: Drifts, radii: Radii) -> bool:
    """Whether the identity is proven optimal at this space. False proves nothing."""
    return isinstance(space.group, Permutation) and _is_within(space, drifts, radii)


def keeps_order(space: Space, drifts: Drifts, radii: Radii) -> bool:
    """Whether no block is exchanged in the best element of this space. False proves nothing."""
    return isinstance(space.group, Wreath) and _is_within(space, drifts, radii)


def _is_within(space: Space, drifts: Drifts, radii: Radii) -> bool:
    if space.name not in radii:
        return False
    drift = torch.stack(list(drifts.values())).sum(0).sqrt()
    return bool((drift < radii[space.name].to(drift.device) * _SLACK).all())


def _drift(axis: Axis, space: Space, anchor: State, client: State) -> Float[Tensor, " blocks"]:
    width = space.width(axis.role)
    ours, theirs = (axis.rows(state[axis.tensor], width) for state in (anchor, client))
    # A difference of two halves is rounded to half; the proof cannot spare those digits.
    single = torch.promote_types(ours.dtype, torch.float32)
    # Not a norm: over any axis but the last in memory, torch's takes ten times as long. Not in double: a sum in
    # parts is exact to a few roundings, and the radii spare a thousand.
    squares = [
        (client_rows - anchor_rows.to(single)).square_().sum(1).double()
        for anchor_rows, client_rows in zip(ours.split(_PIECE), theirs.split(_PIECE), strict=True)
    ]
    return torch.cat(squares).reshape(space.group.count, -1).sum(1)


def _units(space: Space, state: State) -> Float[Tensor, "units features"]:
    rows = [axis.rows(state[axis.tensor], space.width()) for axis in space.scored]
    single = torch.promote_types(rows[0].dtype, torch.float32)
    return torch.cat([each.to(single) for each in rows], dim=1)


def _half_separation(units: Float[Tensor, "units features"]) -> Float[Tensor, " units"]:
    # ||x_i - x_j||^2 loses its digits where the two are close; what is lost can only be given away.
    squares = units.square().sum(1)
    doubt = (units.shape[1] + 8) * torch.finfo(units.dtype).eps
    nearest = [
        _gaps(start, rows, units, squares, doubt).amin(1)
        for start, rows in zip(range(0, len(units), _ROWS), units.split(_ROWS), strict=True)
    ]
    return (torch.cat(nearest).sqrt() / 2).float()


def _gaps(start: int, rows: Tensor, units: Tensor, squares: Tensor, doubt: float) -> Tensor:
    sums = squares[start : start + len(rows), None] + squares
    gaps = (sums * (1 - doubt) - 2 * rows @ units.mT).clamp_min(0)
    gaps.diagonal(start).fill_(torch.inf)
    return gaps


def _is_provable(group: Wreath) -> bool:
    """Whether its elements keep lengths, and all blocks can be compared at once."""
    keeps_lengths = all(dual == role for role, dual in enumerate(group.duals))
    return keeps_lengths and max(group.widths) <= _WIDEST


def _half_separation_of_blocks(
    space: Space, group: Wreath, anchor: State
) -> Float[Tensor, " blocks"]:
    scores = _self_scores(space, group, anchor)
    home = torch.arange(group.count)
    # A block's own entry of M is its rows' products: the trace is the squared norm.
    own = torch.stack([score[home, home].diagonal(dim1=-2, dim2=-1).sum(-1) for score in scores])
    squares = own.sum(0)
    # No map that keeps lengths agrees better than `||M||_* <= sqrt(size) ||M||`, at a fraction of its cost.
    best = torch.stack(
        [score.square().sum((-2, -1)).sqrt() * score.shape[-1] ** 0.5 for score in scores]
    )
    gaps = ((squares[:, None] + squares) * (1 - _DOUBT) - 2 * best.sum(0)).clamp_min(0)
    return (gaps.fill_diagonal_(torch.inf).amin(1).sqrt() / 2).float()


def _self_scores(space: Space, group: Wreath, anchor: State) -> tuple[Tensor, ...]:
    totals: dict[int, Tensor] = {}
    for axis in space.scored:
        rows = axis.rows(anchor[axis.tensor], space.width(axis.role)).double()
        score = group.score(rows, rows, axis.role).cpu()
        totals[axis.role] = totals[axis.role] + score if axis.role in totals else score
    return tuple(totals[role] for role in sorted(totals))
