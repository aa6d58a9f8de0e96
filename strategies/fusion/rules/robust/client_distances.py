"""Distances between clients' updates, and weights of clients, from the matrix of the updates' inner products.

A rule that decides by whole models needs only the inner products of the clients' updates, a matrix of clients by
clients: it is summed tensor by tensor, and the iterations of the rules cost next to nothing.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Products = Float[Tensor, "clients clients"]
Weights = Float[Tensor, " clients"]


class TooFewClientsError(ValueError):
    """Fewer clients than a robust rule needs to withstand the hostile ones."""

    def __init__(self, rule: str, least: int, clients: int) -> None:
        super().__init__(
            f"robust = {rule!r} needs at least {least} clients and has {clients}; ask more clients "
            "(fedbasin.min-train-nodes), lower fedbasin.hostile-clients, or choose another rule"
        )


def capped(weights: Weights) -> Weights:
    """Return the weights with none above the median: a number of examples is a claim that nobody can check."""
    return weights.clamp(max=float(weights.median()))


def pairwise_distances(products: Products) -> Products:
    """Return the squared distances of all pairs of updates; infinite where they overflow."""
    norms = products.diagonal()
    squares = norms[:, None] + norms - 2 * products
    return squares.clamp(min=0).nan_to_num(nan=torch.inf)


def distances_from(products: Products, coefficients: Weights) -> Weights:
    """Return the distance of each update from the combination of updates with these coefficients."""
    projections = products @ coefficients
    squares = products.diagonal() - 2 * projections + coefficients @ projections
    return squares.clamp(min=0).sqrt()
