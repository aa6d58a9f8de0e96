"""Graph matching: relaxed permutations of all spaces step together towards the best orders, and are rounded last.

    P  <-  P + t (D - P)        D_s = the best order for M_s under the soft P of all other spaces,  t maximises J

This is the method of Frank and Wolfe on soft permutations, from the one that mixes all units alike, for the quadratic
assignment that the layers of two networks pose (for one graph: Vogelstein et al. 2015, PLoS ONE 10; for networks: Liu et
al. 2022, ICML, and Crisostomi et al. 2024, arXiv 2405.17897). Its result is used only where it is closer to the anchor
than ascent from the client as it is. Needs no data.
"""

import torch
from torch import Tensor

from fedbasin.strategies.alignment.coordinate_ascent import agreement
from fedbasin.strategies.alignment.identity_bound import IdentityBounds
from fedbasin.strategies.alignment.relaxation import continue_ascent, relaxed_spaces, soft_element
from fedbasin.strategies.alignment.transformed_state import TransformedState
from fedbasin.strategies.alignment.weight_matching import Alignment, fold_state, match_weights
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry
from fedbasin.strategies.tensors.state import State

# Gains of the objective below this share are not worth another step.
_PROGRESS = 1e-4

_MOST_STEPS = 60


def match_graph(
    symmetry: Symmetry,
    anchor: State,
    client: State,
    bounds: IdentityBounds | None = None,
    *,
    prior: float = 1e-6,
    max_sweeps: int = 100,
) -> Alignment:
    """Align `client` to `anchor`, at least as closely as `match_weights` does with the same arguments.

    The arguments and laws are those of `match_weights`. Nothing is relaxed where the identity is proven best at every
    space. Groups other than permutations, and spaces with one tensor on two axes, are left to coordinate ascent.

    Raises:
        SymmetryError: a norm's weight is too close to zero to divide by.
    """
    anchor, client = fold_state(symmetry, anchor), fold_state(symmetry, client)
    best = match_weights(symmetry, anchor, client, bounds, prior=prior, max_sweeps=max_sweeps)
    spaces = relaxed_spaces(symmetry)
    if not spaces or all(space.certified for space in best.report.spaces):
        return best
    steps = _relax(symmetry, spaces, anchor, best.state, prior)
    result = continue_ascent(symmetry, anchor, client, best, steps, prior=prior, max_sweeps=max_sweeps)
    return result if result.report.distance_after < best.report.distance_after else best


def _relax(symmetry: Symmetry, spaces: list[Space], anchor: State, client: State, prior: float) -> dict[str, Element]:
    """Return the permutations next to where the relaxed ones end, by space name."""
    names = sorted({axis.tensor for space in spaces for axis in space.scored})
    plans = {space.name: torch.full((n, n), 1.0 / n) for space in spaces for n in [space.width(0)]}

    def objective(plans: dict[str, Tensor]) -> float:
        moved = _soften(symmetry, client, plans)
        return sum(float((anchor[name].cpu().double() * moved[name].cpu().double()).sum()) for name in names)

    value = objective(plans)
    for _ in range(_MOST_STEPS):
        steps, slope = _steepest(symmetry, spaces, anchor, client, plans, prior)
        if slope <= _PROGRESS * abs(value):
            break
        curvature = objective({name: plans[name] + step for name, step in steps.items()}) - value - slope
        # Exact where no tensor is on more than two spaces, so that J is quadratic along the step.
        length = 1.0 if 2 * curvature >= -slope else -slope / (2 * curvature)
        plans = {name: plans[name] + length * step for name, step in steps.items()}
        value = objective(plans)
    return {space.name: space.group.maximiser((plans[space.name],), prior) for space in spaces}


def _steepest(
    symmetry: Symmetry, spaces: list[Space], anchor: State, client: State, plans: dict[str, Tensor], prior: float
) -> tuple[dict[str, Tensor], float]:
    """Return the steps from the plans to the best orders under them, and by how much J begins to rise along these."""
    steps, slope = {}, 0.0
    for space in spaces:
        # A space's score must not see its own soft matrix.
        others = {name: plan for name, plan in plans.items() if name != space.name}
        (score,) = agreement(space, space.group, anchor, _soften(symmetry, client, others))
        order = space.group.maximiser((score,), prior).order
        steps[space.name] = torch.eye(len(order))[order] - plans[space.name]
        slope += float((score.cpu().double() * steps[space.name]).sum())
    return steps, slope


def _soften(symmetry: Symmetry, client: State, plans: dict[str, Tensor]) -> TransformedState:
    return TransformedState(symmetry, client, {name: soft_element(plan) for name, plan in plans.items()})
