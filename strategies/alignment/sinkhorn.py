"""Sinkhorn matching: soft permutations are annealed and rounded, so that all spaces decide before any is settled.

    P_s  <-  sinkhorn(M_s / t)        M_s under the soft P of all other spaces,  t falling to 0

`sinkhorn` scales a matrix to row and column sums of 1 and is differentiable; at a low temperature it gives the best
permutation (softassign: Gold and Rangarajan 1996; the scaling: Cuturi 2013; for networks: Peña et al. 2023, CVPR). Its
result is used only where it is closer to the anchor than ascent from the client as it is. Needs no data.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.alignment.coordinate_ascent import agreement
from fedbasin.strategies.alignment.identity_bound import IdentityBounds
from fedbasin.strategies.alignment.relaxation import continue_ascent, relaxed_spaces, soft_element
from fedbasin.strategies.alignment.transformed_state import TransformedState
from fedbasin.strategies.alignment.weight_matching import Alignment, fold_state, match_weights
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State

# Temperatures as shares of a score's standard deviation, from nearly uniform to nearly a permutation.
_TEMPERATURES = tuple(2.0 * 0.5**step for step in range(8))

# Gains in distance below this share are rounding.
_PROGRESS = 1e-6

# Largest number of annealings; each starts from the closest alignment so far.
_MOST_STARTS = 10


def sinkhorn(score: Float[Tensor, "n m"], temperature: float, iterations: int = 30) -> Float[Tensor, "n m"]:
    """Return the plan `P` with equal sums that maximises `<P, score> + temperature * entropy(P)`.

    Rows sum to 1 and columns to `n / m`, up to an error that shrinks geometrically with the iterations. Differentiable.
    """
    # In logarithms, because `exp(score / temperature)` overflows at low temperatures.
    logits = score / temperature
    share = torch.log(torch.tensor(score.shape[0] / score.shape[1], dtype=score.dtype))
    for _ in range(iterations):
        logits = logits - logits.logsumexp(0, keepdim=True) + share
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.exp()


def match_sinkhorn(
    symmetry: Symmetry,
    anchor: State,
    client: State,
    bounds: IdentityBounds | None = None,
    *,
    prior: float = 1e-6,
    max_sweeps: int = 100,
) -> Alignment:
    """Align `client` to `anchor`, at least as closely as `match_weights` does with the same arguments.

    The arguments and laws are those of `match_weights`. Nothing is annealed where the identity is proven best at every
    space. Groups other than permutations, and spaces with one tensor on two axes, are left to coordinate ascent.

    Raises:
        SymmetryError: a norm's weight is too close to zero to divide by.
    """
    anchor, client = fold_state(symmetry, anchor), fold_state(symmetry, client)
    best = match_weights(symmetry, anchor, client, bounds, prior=prior, max_sweeps=max_sweeps)
    if all(space.certified for space in best.report.spaces):
        return best
    for _ in range(_MOST_STARTS):
        steps = _anneal(symmetry, anchor, best.state, prior)
        alignment = continue_ascent(symmetry, anchor, client, best, steps, prior=prior, max_sweeps=max_sweeps)
        if alignment.report.distance_after >= best.report.distance_after * (1 - _PROGRESS):
            break
        best = alignment
    return best


def _anneal(symmetry: Symmetry, anchor: State, client: State, prior: float) -> dict[str, Element]:
    """Return the permutations in which soft ones of falling temperature end, by space name."""
    spaces = relaxed_spaces(symmetry)
    soft = TransformedState(symmetry, client, {})
    scores: dict[str, Tensor] = {}
    for temperature in _TEMPERATURES:
        for space in spaces:
            # A space's score must not see its own soft matrix.
            soft.elements.pop(space.name, None)
            (score,) = agreement(space, space.group, anchor, soft)
            scores[space.name] = score
            soft.elements[space.name] = _soften(score, temperature)
    return {space.name: space.group.maximiser((scores[space.name],), prior) for space in spaces}


def _soften(score: Tensor, temperature: float) -> Element:
    spread = float(score.double().std(correction=0)) or 1.0
    return soft_element(sinkhorn(score.double() / spread, temperature))
