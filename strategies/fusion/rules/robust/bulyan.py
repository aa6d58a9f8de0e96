"""Bulyan: a trimmed mean around the median of clients that Krum has selected (El Mhamdi et al. 2018, arXiv 1802.07927).

The paper selects by Krum again and again without the clients that are selected already. One ranking by Krum's scores
is taken here, as Flower does: it needs the distances once.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedbasin.strategies.fusion.rules.robust.client_distances import Products
from fedbasin.strategies.fusion.rules.robust.krum import order_by_krum
from fedbasin.strategies.fusion.rules.robust.median import median


def nearest_to_median(anchor: Tensor, tensors: Tensor, weights: Tensor, *, hostile: int) -> Tensor:
    """Return the mean of each entry over the clients nearest to its median, all but `2 hostile` of them.

    Args:
        anchor: the tensor of the global model, which is not read.
        tensors: the selected clients' tensors, along the first axis.
        weights: of the clients, which are not read: a claimed number of examples would break the bound.
        hostile: number of hostile clients.
    """
    # Of equal distances the smaller value comes first, so that the order of arrival does not decide.
    ordered = tensors.sort(0).values
    distances = (ordered - median(anchor, tensors, weights)).abs()
    nearest = distances.argsort(dim=0, stable=True)[: len(tensors) - 2 * hostile]
    return ordered.gather(0, nearest).mean(0)


@dataclass(frozen=True)
class Bulyan:
    """The mean of each coordinate's values nearest to its median, over `n - 2 f` clients that Krum selects.

    Attributes:
        hostile: number f of hostile clients that it withstands.
    """

    hostile: int
    name: ClassVar[str] = "bulyan"

    @property
    def least(self) -> int:
        """The smallest number of clients: n >= 4 f + 3."""
        return 4 * self.hostile + 3

    def select(self, products: Products) -> Tensor:
        """Return the numbers of the clients whose values are compared."""
        return order_by_krum(products, self.hostile)[: len(products) - 2 * self.hostile]

    def __call__(self, anchor: Tensor, tensors: Tensor, weights: Tensor) -> Tensor:
        return nearest_to_median(anchor, tensors, weights, hostile=self.hostile)
