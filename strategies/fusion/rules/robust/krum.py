"""Krum and Multi-Krum: the clients that are closest to their neighbours (Blanchard et al. 2017, arXiv 1703.02757)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedbasin.strategies.fusion.rules.robust.client_distances import Products, Weights, pairwise_distances


def order_by_krum(products: Products, hostile: int) -> Tensor:
    """Return the clients in the order of their scores, the best first.

    The score of a client is the sum of its squared distances to the nearest `clients - hostile - 2`. Of equal scores
    the smaller update comes first, so that the order of arrival does not decide.
    """
    distances = pairwise_distances(products)
    distances.fill_diagonal_(torch.inf)
    closest = max(1, len(products) - hostile - 2)
    scores = distances.sort(1).values[:, :closest].sum(1)
    by_norm = products.diagonal().argsort(stable=True)
    return by_norm[scores[by_norm].argsort(stable=True)]


def _mean_of(selected: Tensor, weights: Weights) -> Weights:
    coefficients = torch.zeros_like(weights)
    coefficients[selected] = weights[selected] / weights[selected].sum()
    return coefficients


@dataclass(frozen=True)
class Krum:
    """The model of the one client that is closest to its neighbours.

    Attributes:
        hostile: number of hostile clients that it withstands.
    """

    hostile: int
    name: ClassVar[str] = "krum"

    @property
    def least(self) -> int:
        """The smallest number of clients: n > 2 f + 2."""
        return 2 * self.hostile + 3

    def coefficients(self, products: Products, weights: Weights) -> Weights:
        return _mean_of(order_by_krum(products, self.hostile)[:1], weights)


@dataclass(frozen=True)
class MultiKrum:
    """The mean, by examples, of the `n - f` clients that are closest to their neighbours.

    Attributes:
        hostile: number f of hostile clients that it withstands.
    """

    hostile: int
    name: ClassVar[str] = "multi-krum"

    @property
    def least(self) -> int:
        """The smallest number of clients: n > 2 f + 2."""
        return 2 * self.hostile + 3

    def coefficients(self, products: Products, weights: Weights) -> Weights:
        selected = len(products) - self.hostile
        return _mean_of(order_by_krum(products, self.hostile)[:selected], weights)
