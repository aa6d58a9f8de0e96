"""Soft fusion: units are mixed by optimal transport before they are averaged. Not an alignment.

    W' = T W (T_in)^T        T = argmax_T <T, M> + temperature * entropy(T),  rows and columns of T sum to 1

A unit of the anchor gets a mixture of the client's units (OTFusion, Singh and Jaggi 2020, arXiv 1910.05653, with equal
marginals). A mixture is no symmetry: the client's function changes, so its loss after `soften` says nothing about the
client, and no path to it is a barrier between the two. At temperature 0 this is matching.
"""

import torch
from torch import Tensor

from fedbasin.strategies.alignment.coordinate_ascent import agreement
from fedbasin.strategies.alignment.sinkhorn import sinkhorn
from fedbasin.strategies.alignment.transformed_state import Moved
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.groups.groups import Permutation
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State, interpolate


def soft_fusion(
    symmetry: Symmetry,
    anchor: State,
    client: State,
    share: float = 0.5,
    temperature: float = 0.05,
) -> dict[str, Tensor]:
    """The mean of the anchor and the softened client.

    Args:
        symmetry: the spaces; those of other groups than permutations stay as they are.
        anchor: whose units are kept in their places.
        client: whose units are mixed.
        share: of the client.
        temperature: as a share of each score's standard deviation; the lower, the fewer units are mixed.
    """
    return interpolate(anchor, soften(symmetry, anchor, client, temperature), share)


def soften(
    symmetry: Symmetry, anchor: State, client: State, temperature: float = 0.05
) -> dict[str, Tensor]:
    """The client with its units mixed towards the anchor's, space after space; another function than before.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature = {temperature}; at 0 there is nothing soft: match weights instead"
        )
    mixed = Moved(symmetry, client, {})
    for space in symmetry.spaces:
        if isinstance(space.group, Permutation):
            (score,) = agreement(space, space.group, anchor, mixed)
            mixed.elements[space.name] = _mixture(score, temperature)
    return {name: mixed[name] for name in client}


def _mixture(score: Tensor, temperature: float) -> Element:
    """A plan as one block over all units."""
    spread = float(score.double().std(correction=0)) or 1.0
    plan = sinkhorn(score.double() / spread, temperature, iterations=100)
    return Element(torch.arange(1), (plan.cpu()[None],), (len(plan),))
