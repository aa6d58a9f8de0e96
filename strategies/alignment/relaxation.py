"""Searches that pass through soft permutations: what those of annealed and of relaxed orders have in common.

A soft permutation is a matrix with rows and columns of equal sums. It is not a symmetry, so a search only passes through
such matrices and ends in permutations, from which coordinate ascent continues.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.alignment.coordinate_ascent import Ascent
from fedbasin.strategies.alignment.weight_matching import Alignment, finish_ascent
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry
from fedbasin.strategies.tensors.state import State


def relaxed_spaces(symmetry: Symmetry) -> list[Space]:
    """Return the spaces that are permuted alone, without a tensor on two of their axes."""
    return [space for space in symmetry.spaces if space.group.is_permutation and not space.quadratic]


def soft_element(plan: Float[Tensor, "n n"]) -> Element:
    """Return a soft permutation as one block that mixes all units; it is not a group element."""
    return Element(torch.arange(1), (plan.cpu()[None],), (len(plan),))


def continue_ascent(
    symmetry: Symmetry,
    anchor: State,
    client: State,
    alignment: Alignment,
    steps: Mapping[str, Element],
    *,
    prior: float,
    max_sweeps: int,
) -> Alignment:
    """Return where coordinate ascent ends that begins at an alignment of the client followed by steps of some spaces."""
    ascent = Ascent(symmetry, anchor, client, {}, prior)
    for name, element in steps.items():
        ascent.client.elements[name] = element.after(alignment.transform.elements[name])
    return finish_ascent(ascent, max_sweeps)
