"""Centred clipping: norm clipping around the result of the last pass (Karimireddy et al. 2021, arXiv 2012.10333).

    v <- v + sum_k w_k (u_k - v) min(1, r / |u_k - v|)        r  the median of |u_k - v|

The paper takes the radius r as given and starts from the momentum of the round before. Here r is the median distance,
which no minority can choose, and v starts at the anchor.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedbasin.strategies.fusion.rules.robust.client_distances import Products, Weights, capped, distances_from
from fedbasin.strategies.fusion.rules.robust.norm_clipping import clip_factors

_PASSES = 10


@dataclass(frozen=True)
class CentredClipping:
    """The mean of differences from a centre, shortened to the median; no client weighs more than the median weight."""

    name: ClassVar[str] = "centred-clipping"

    @property
    def least(self) -> int:
        """The smallest number of clients among which one can be outvoted."""
        return 3

    def coefficients(self, products: Products, weights: Weights) -> Weights:
        weights = capped(weights)
        weights = weights / weights.sum()
        centre = torch.zeros_like(weights)
        for _ in range(_PASSES):
            steps = weights * clip_factors(distances_from(products, centre))
            centre = (1 - steps.sum()) * centre + steps
        return centre
