"""Proof, in one pass over the weights, that the identity is the best permutation.

Let `x_i` be all that the anchor's unit i reads and writes, `d_i` the client's change of it, and
`r_i = min_j ||x_i - x_j|| / 2` the unit's identity radius. If `||d_i|| < r_i` for every unit, then any
displaced unit costs more than it saves,

    ||x_i - (x_j + d_j)|| >= ||x_i - x_j|| - ||d_j|| > ||d_j||      for i != j

so the identity is the unique optimum of the assignment. The radii depend on the anchor alone: they are
computed once per round and sent along, and a client that trained from the anchor pays one norm.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.chunks import one_core
from fedbasin.strategies.state import State
from fedbasin.strategies.symmetry.groups import Permutation
from fedbasin.strategies.symmetry.sites import Member, Site, Symmetry

Radii = Mapping[str, Float[Tensor, " units"]]

# A radius that rounding could have made too large proves nothing.
_SLACK = 1 - 1e-4

# Units compared at a time, so that memory does not grow with the square of the width.
_ROWS = 1024

# Units whose drift is measured at a time, so that their change stays in the cache.
_PIECE = 256


def identity_radii(symmetry: Symmetry, anchor: State) -> dict[str, Tensor]:
    """The identity radius of every unit of every permutation site, by site name."""
    return {
        site.name: _half_separation(_units(site, anchor))
        for site in symmetry.sites
        if isinstance(site.group, Permutation) and not site.quadratic
    }


def is_certified(site: Site, anchor: State, client: State, radii: Radii) -> bool:
    """Whether the identity is proven optimal at this site. False proves nothing."""
    if site.name not in radii:
        return False
    with one_core():
        drift = torch.stack([_drift(m, site.width(), anchor, client) for m in site.scored])
        radius = radii[site.name].to(drift.device)
        return bool((torch.linalg.vector_norm(drift, dim=0) < radius * _SLACK).all())


def _drift(member: Member, width: int, anchor: State, client: State) -> Float[Tensor, " units"]:
    ours, theirs = (member.rows(state[member.tensor], width) for state in (anchor, client))
    # A difference of two halves is rounded to half; the proof cannot spare those digits.
    single = torch.promote_types(ours.dtype, torch.float32)
    # Not a norm: over any axis but the last in memory, torch's takes ten times as long.
    squares = [
        (client_rows - anchor_rows.to(single)).double().square_().sum(1)
        for anchor_rows, client_rows in zip(ours.split(_PIECE), theirs.split(_PIECE), strict=True)
    ]
    return torch.cat(squares).sqrt_()


def _units(site: Site, state: State) -> Float[Tensor, "units features"]:
    return torch.cat([m.rows(state[m.tensor], site.width()).double() for m in site.scored], dim=1)


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
