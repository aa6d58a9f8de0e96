"""Sinkhorn matching: orders are softened, annealed and rounded, so that all spaces decide before any is settled.

    P_s  <-  sinkhorn(M_s / t)        M_s under the soft P of all other spaces,  t falling to 0

`sinkhorn` scales a matrix to row and column sums of 1 and can be differentiated; at a low temperature it is the best
order (softassign: Gold and Rangarajan 1996; for networks Peña et al. 2023, CVPR, and Cuturi 2013 for the scaling). Soft
matrices are no symmetry: they are only where the search passes. It ends in whole units, from which coordinate ascent
goes on, and is taken only if it ends nearer to the anchor than ascent from where the client is. Data-free.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.alignment.coordinate_ascent import Ascent, agreement
from fedbasin.strategies.alignment.identity_bound import Radii
from fedbasin.strategies.alignment.transformed_state import Moved
from fedbasin.strategies.alignment.weight_matching import Alignment, finished, folded, match_weights
from fedbasin.strategies.symmetry.groups.assignment import assign
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.groups.groups import Permutation
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry
from fedbasin.strategies.tensors.state import State

# Temperatures, as shares of a score's standard deviation: nearly uniform at first, nearly an order at last.
_TEMPERATURES = tuple(2.0 * 0.5**step for step in range(8))

# Gains in distance below this share are rounding.
_PROGRESS = 1e-6

# Starts that were each better than the one before; more are not seen.
_MOST_STARTS = 10


def sinkhorn(
    score: Float[Tensor, "n m"], temperature: float, iterations: int = 30
) -> Float[Tensor, "n m"]:
    """The plan `P` with equal sums that maximises `<P, score> + temperature * entropy(P)`.

    Rows sum to 1 and columns to `n / m`; up to what the iterations leave, which shrinks geometrically. Differentiable.
    """
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
    radii: Radii | None = None,
    *,
    prior: float = 1e-6,
    max_sweeps: int = 100,
) -> Alignment:
    """Align `client` to `anchor`, at least as close as `match_weights` with the same arguments brings it.

    Laws: as of `match_weights`. Where that proves the identity at every space, nothing is softened. Groups other than
    permutations, and spaces with one tensor on two axes, are left to the ascent.

    Raises:
        FoldError: a norm's gain vanishes where it would have to be divided by.
    """
    anchor, client = folded(symmetry, anchor), folded(symmetry, client)
    best = match_weights(symmetry, anchor, client, radii, prior=prior, max_sweeps=max_sweeps)
    if all(space.certified for space in best.report.spaces):
        return best
    for _ in range(_MOST_STARTS):
        ascent = Ascent(symmetry, anchor, client, {}, prior)
        for name, element in _annealed(symmetry, anchor, best.state, prior).items():
            ascent.client.elements[name] = element.after(best.transform.elements[name])
        found = finished(ascent, max_sweeps)
        if found.report.distance_after >= best.report.distance_after * (1 - _PROGRESS):
            break
        best = found
    return best


def _annealed(symmetry: Symmetry, anchor: State, client: State, prior: float) -> dict[str, Element]:
    """The orders that soft ones of falling temperature end in."""
    spaces = [s for s in symmetry.spaces if isinstance(s.group, Permutation) and not s.quadratic]
    soft = Moved(symmetry, client, {})
    scores: dict[str, Tensor] = {}
    for temperature in _TEMPERATURES:
        for space in spaces:
            soft.elements.pop(space.name, None)
            (score,) = agreement(space, space.group, anchor, soft)
            scores[space.name] = score
            soft.elements[space.name] = _softened(score, temperature)
    return {space.name: _rounded(space, scores[space.name], prior) for space in spaces}


def _softened(score: Tensor, temperature: float) -> Element:
    """A soft order as one block that mixes all units; not a group element."""
    spread = float(score.double().std(correction=0)) or 1.0
    plan = sinkhorn(score.double() / spread, temperature)
    return Element(torch.arange(1), (plan.cpu()[None],), (len(plan),))


def _rounded(space: Space, score: Tensor, prior: float) -> Element:
    bonus = prior * float(torch.linalg.vector_norm(score)) / len(score) ** 0.5
    return Element(assign(score, bonus), (None,), space.group.sizes)
