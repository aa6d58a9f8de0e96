"""The geometric median: the point with the least sum of distances to the clients' updates.

    z = argmin_z  sum_k w_k |z - u_k|        z <- sum_k w_k u_k / max(v, |z - u_k|)  /  sum_k w_k / max(v, |z - u_k|)

The iteration is Weiszfeld's (1937), smoothed by v: Pillutla et al. 2022 (RFA), arXiv 1912.13445. Every iterate is a
combination of updates, so that its distances follow from inner products. Over means of parts of the data it is the
median of means in a space with an inner product: Minsker 2015, arXiv 1308.1334.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedbasin.strategies.fusion.rules.robust.client_distances import Products, Weights, capped, distances_from

# Least distance that is divided by, relative to the median norm of the updates.
_SMOOTHING = 1e-6
_CONVERGED = 1e-9
_MAX_ITERATIONS = 200


def geometric_median(products: Products, weights: Weights) -> Weights:
    """Return the coefficients of the updates whose combination is their weighted geometric median."""
    smoothing = max(_SMOOTHING * float(products.diagonal().sqrt().median()), torch.finfo(products.dtype).tiny)
    # The first distances are from the anchor: from the mean, which one client can move anywhere, the way is long.
    coefficients = torch.zeros_like(weights)
    for _ in range(_MAX_ITERATIONS):
        pulls = weights / distances_from(products, coefficients).clamp(min=smoothing)
        previous, coefficients = coefficients, pulls / pulls.sum()
        if float((coefficients - previous).abs().max()) < _CONVERGED:
            break
    return coefficients


@dataclass(frozen=True)
class GeometricMedian:
    """The geometric median of whole models, in which no client weighs more than the median of the weights."""

    name: ClassVar[str] = "geometric-median"

    @property
    def least(self) -> int:
        """The smallest number of clients among which one can be outvoted."""
        return 3

    def coefficients(self, products: Products, weights: Weights) -> Weights:
        return geometric_median(products, capped(weights))
