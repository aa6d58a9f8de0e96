"""Identity bounds: prove in one pass over the weights that the best permutation is the identity.

Let `x_i` be all weights that the anchor's unit i reads and writes, `d_i` the client's change of them, and

    r_i = min_j ||x_i - x_j|| / 2        the identity bound of unit i

If `||d_i|| < r_i` for every unit, a displaced unit costs more than it saves,

    ||x_i - (x_j + d_j)|| >= ||x_i - x_j|| - ||d_j|| > ||d_j||      for i != j

so the identity is the unique optimum of the assignment. For blocks that may also rotate, such as attention heads,
`min_g ||x_i - g x_j||` takes the place of `||x_i - x_j||` and the proof covers their order: what is left to compute is
the rotation of every block in its place. The bounds depend on the anchor alone. The server computes them once per round
and sends them, and a client that trained from the anchor pays for one norm.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.symmetry.groups.groups import Group
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry
from fedbasin.strategies.tensors.parallel import one_core
from fedbasin.strategies.tensors.state import State

IdentityBounds = Mapping[str, Float[Tensor, " units"]]

Drifts = Mapping[Axis, Float[Tensor, " blocks"]]
"""Squared change of each unit, or block of units, from anchor to client, by axis of the space."""

# A bound that rounding could have made too large proves nothing.
_SLACK = 1 - 1e-4

# Units compared at a time, so that memory does not grow with the square of the width.
_ROWS = 1024

# Width of a role beyond which blocks are not compared: the score of all with all is held at once.
_WIDEST = 8192

# Relative error of a sum in double, with a margin.
_DOUBT = 1e-9

# Units whose drift is measured at a time, so that their change stays in the cache.
_PIECE = 256


def identity_bounds(symmetry: Symmetry, anchor: State) -> dict[str, Tensor]:
    """Compute the identity bound of every unit or block that may change places, by space name.

    Spaces without a proof are left out: those with a tensor on two of their axes, those whose elements do not keep
    lengths, and those whose blocks are too wide to compare.
    """
    bounds = {}
    for space in symmetry.spaces:
        if space.quadratic or not space.group.permutes_blocks:
            continue
        if space.group.is_permutation:
            bounds[space.name] = _half_separation(_units(space, anchor))
        elif not space.group.stretches and max(space.group.widths) <= _WIDEST:
            bounds[space.name] = _half_separation_of_blocks(space, space.group, anchor)
    return bounds


def drifts_of(space: Space, anchor: State, client: State) -> Drifts:
    """Measure the squared change of every unit or block of a space, axis by axis."""
    with one_core():
        return {axis: _drift(axis, space, anchor, client) for axis in space.scored}


def is_certified(space: Space, drifts: Drifts, bounds: IdentityBounds) -> bool:
    """Return True if the identity is proven to be optimal at this space; False proves nothing."""
    return space.group.is_permutation and _is_within(space, drifts, bounds)


def keeps_order(space: Space, drifts: Drifts, bounds: IdentityBounds) -> bool:
    """Return True if the best element of this space provably exchanges no blocks; False proves nothing."""
    return not space.group.is_permutation and _is_within(space, drifts, bounds)


def _is_within(space: Space, drifts: Drifts, bounds: IdentityBounds) -> bool:
    if space.name not in bounds:
        return False
    drift = torch.stack(list(drifts.values())).sum(0).sqrt()
    return bool((drift < bounds[space.name].to(drift.device) * _SLACK).all())


def _drift(axis: Axis, space: Space, anchor: State, client: State) -> Float[Tensor, " blocks"]:
    width = space.width(axis.role)
    anchor_rows, client_rows = (axis.rows(state[axis.tensor], width) for state in (anchor, client))
    # A difference of two half-precision tensors is rounded to half; the proof cannot spare those digits.
    single = torch.promote_types(anchor_rows.dtype, torch.float32)
    # torch's norm takes ten times as long over any axis but the last in memory. Double precision would be wasted:
    # a sum in parts is exact to a few roundings, and `_SLACK` leaves room for a thousand.
    pieces = zip(anchor_rows.split(_PIECE), client_rows.split(_PIECE), strict=True)
    squares = [(new - old.to(single)).square_().sum(1).double() for old, new in pieces]
    return torch.cat(squares).reshape(space.group.count, -1).sum(1)


def _units(space: Space, state: State) -> Float[Tensor, "units features"]:
    rows = [axis.rows(state[axis.tensor], space.width()) for axis in space.scored]
    single = torch.promote_types(rows[0].dtype, torch.float32)
    return torch.cat([row.to(single) for row in rows], dim=1)


def _half_separation(units: Float[Tensor, "units features"]) -> Float[Tensor, " units"]:
    # As a difference of products, ||x_i - x_j||^2 loses digits where the two units are close. Subtracting the largest
    # possible error keeps the bound valid; direct differences could not use a matrix product.
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


def _half_separation_of_blocks(space: Space, group: Group, anchor: State) -> Float[Tensor, " blocks"]:
    scores = _self_scores(space, group, anchor)
    home = torch.arange(group.count)
    # The entry of M for a block and itself is the block's Gram matrix, so its trace is the block's squared norm.
    traces = [score[home, home].diagonal(dim1=-2, dim2=-1).sum(-1) for score in scores]
    squares = torch.stack(traces).sum(0)
    # The best orthogonal map reaches the nuclear norm `||M||_*`. Its upper bound `sqrt(size) ||M||` saves a
    # decomposition for every pair of blocks.
    best = torch.stack([score.square().sum((-2, -1)).sqrt() * score.shape[-1] ** 0.5 for score in scores])
    gaps = ((squares[:, None] + squares) * (1 - _DOUBT) - 2 * best.sum(0)).clamp_min(0)
    return (gaps.fill_diagonal_(torch.inf).amin(1).sqrt() / 2).float()


def _self_scores(space: Space, group: Group, anchor: State) -> tuple[Tensor, ...]:
    totals: dict[int, Tensor] = {}
    for axis in space.scored:
        rows = axis.rows(anchor[axis.tensor], space.width(axis.role)).double()
        score = group.score(rows, rows, axis.role).cpu()
        totals[axis.role] = totals[axis.role] + score if axis.role in totals else score
    return tuple(totals[role] for role in sorted(totals))
