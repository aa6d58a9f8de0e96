"""Norm clipping: no client moves the model further than the median client (Sun et al. 2019, arXiv 1911.07963)."""

from dataclasses import dataclass
from typing import ClassVar

from fedbasin.strategies.fusion.rules.robust.client_distances import Products, Weights, capped


def clip_factors(distances: Weights) -> Weights:
    """Return the factor on each distance that makes it at most the median distance."""
    return (distances.median() / distances).nan_to_num(nan=1.0).clamp(max=1)


@dataclass(frozen=True)
class NormClipping:
    """The mean of updates that are shortened to the median norm; no client weighs more than the median of the weights.

    It bounds how far clients can move the model, and not where to: hostile clients that are many, or patient, prevail.
    """

    name: ClassVar[str] = "norm-clipping"

    @property
    def least(self) -> int:
        """The smallest number of clients among which one can be outvoted."""
        return 3

    def coefficients(self, products: Products, weights: Weights) -> Weights:
        weights = capped(weights)
        return weights / weights.sum() * clip_factors(products.diagonal().sqrt())
