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

from fedbasin.strategies.state import State
from fedbasin.strategies.symmetry.groups import Permutation
from fedbasin.strategies.symmetry.sites import Site, Symmetry

Radii = Mapping[str, Float[Tensor, " units"]]

# A radius that rounding could have made too large proves nothing.
_SLACK = 1 - 1e-4


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
    squares = torch.zeros_like(radii[site.name])
    for member in site.scored:
        change = member.view(client[member.tensor] - anchor[member.tensor])
        units = change.unflatten(member.axis, (site.width(), -1))
        others = [axis for axis in range(units.dim()) if axis != member.axis]
        squares += torch.linalg.vector_norm(units, dim=others).to(squares.dtype) ** 2
    return bool((squares.sqrt() < radii[site.name] * _SLACK).all())


def _units(site: Site, state: State) -> Float[Tensor, "units features"]:
    return torch.cat([m.rows(state[m.tensor], site.width()) for m in site.scored], dim=1)


def _half_separation(units: Float[Tensor, "units features"]) -> Float[Tensor, " units"]:
    # ||x_i - x_j||^2 loses its digits where the two are close; what is lost can only be given away.
    squares = units.square().sum(1)
    gaps = squares[:, None] + squares[None, :] - 2 * units @ units.mT
    doubt = 8 * torch.finfo(units.dtype).eps * (squares[:, None] + squares[None, :])
    gaps = (gaps - doubt).clamp_min(0).fill_diagonal_(torch.inf)
    return gaps.amin(1).sqrt() / 2
