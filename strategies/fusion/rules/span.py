"""Linear combinations of tensors, and the inner products from which their coefficients can be computed.

A rule whose result is a combination of its inputs needs two passes over them: one for the inner products, `[k, k]`, and
one for the sum. What happens in between, such as an iteration, is arithmetic on a small matrix.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.tensors.pieces import map_pieces, stacked_pieces


def combine(anchor: Tensor | None, tensors: Sequence[Tensor], coefficients: Sequence[float] | Tensor) -> Tensor:
    """Return `anchor + sum_k c_k (t_k - anchor)`, or `sum_k c_k t_k` without an anchor, in the first one's dtype."""
    factors = torch.as_tensor(coefficients, dtype=torch.float64)
    if anchor is None:
        return map_pieces(lambda rows: factors.to(rows) @ rows, tensors)

    def kernel(rows: Tensor) -> Tensor:
        return rows[0] + factors.to(rows) @ (rows[1:] - rows[0])

    return map_pieces(kernel, (anchor, *tensors))


def inner_products(anchor: Tensor | None, tensors: Sequence[Tensor]) -> Float[Tensor, "tensors tensors"]:
    """Return the inner products of all pairs, of their differences from an anchor if there is one, in double."""
    total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for rows in stacked_pieces(tensors if anchor is None else (anchor, *tensors)):
        vectors = (rows if anchor is None else rows[1:] - rows[0]).double()
        total += vectors @ vectors.T
    return total


def normalised(weights: Sequence[float]) -> Tensor:
    """Return the weights divided by their sum, in double.

    Raises:
        ValueError: the sum is zero.
    """
    factors = torch.as_tensor(weights, dtype=torch.float64)
    if not factors.sum():
        raise ValueError("the weights add up to zero and cannot be normalised; set normalize: false")
    return factors / factors.sum()
