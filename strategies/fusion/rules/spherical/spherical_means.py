"""Means on a sphere: a mean of the tensors' directions, times the mean of their norms.

Every point is a combination `sum_k c_k u_k` of the unit vectors, so an iteration runs on the coefficients and on the
inner products `G` of the unit vectors: the norm of a point is `sqrt(c' G c)`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.fusion.rules.span import combine, inner_products, normalised

Vector = Float[Tensor, " tensors"]
Matrix = Float[Tensor, "tensors tensors"]

# Norms below this have no direction.
_TINY = 1e-8


def multislerp(
    anchor: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool
) -> Tensor:
    """Return the direction of the weighted sum of unit vectors, with the weighted norm.

    Goddard 2025, "Multi-SLERP", goes on from there by the weighted mean of the tensors in the tangent space, which is
    zero at this point: projecting `sum_k w_k u_k` away from its own direction leaves nothing.

    Args:
        anchor: origin of the sphere; None is zero.
        tensors: the tensors.
        weights: weight of each.
        normalize: divide the weights by their sum.

    Raises:
        ValueError: the weighted directions of more than two tensors cancel.
    """
    parts = normalised(weights) if normalize else torch.as_tensor(weights, dtype=torch.float64)
    if len(tensors) == 1:
        return tensors[0]
    norms, units = _directions(inner_products(anchor, tensors))
    length = _norm(parts, units)
    if length < _TINY:
        if len(tensors) > 2 and norms.any():
            raise ValueError("the weighted directions of the tensors cancel; give other weights")
        return combine(anchor, tensors, parts)
    return combine(anchor, tensors, _unscale(parts / length * (parts @ norms), norms))


def karcher(
    _anchor: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, max_iter: int, tol: float
) -> Tensor:
    """Return the Karcher mean of the directions, with the mean of the norms.

    The mean minimises the weighted squares of the angles: Karcher 1977, Communications on Pure and Applied Mathematics
    30; for models Wang et al. 2026, arXiv 2603.04972. A tensor of zeros counts in the norm alone.

    Args:
        tensors: the tensors.
        weights: weight of each.
        max_iter: largest number of iterations.
        tol: length of a step, in radians, with which the iteration ends.
    """
    norms, units = _directions(inner_products(None, tensors))
    if len(tensors) == 1 or not (norms > tol).any():
        return tensors[0]
    parts = normalised((torch.as_tensor(weights) * (norms > tol)).tolist())
    length = _norm(parts, units)
    # Directions that cancel have no mean to begin with; the first is as good as any.
    start = torch.eye(len(tensors), dtype=torch.float64)[int((norms > tol).int().argmax())]
    mean = parts / length if length > tol else start
    for _ in range(max_iter):
        step = _mean_tangent(mean, parts, units)
        size = _norm(step, units)
        if size <= tol:
            break
        angle = torch.tensor(size, dtype=torch.float64)
        mean = angle.cos() * mean + angle.sin() / angle * step
        mean /= _norm(mean, units)
    return combine(None, tensors, _unscale(mean * (normalised(weights) @ norms), norms))


def _directions(products: Matrix) -> tuple[Vector, Matrix]:
    """Return the norms, and the inner products of unit vectors; those of a zero vector are zero."""
    norms = products.diagonal().clamp(min=0).sqrt()
    safe = torch.where(norms == 0, 1.0, norms)
    return norms, products / safe[:, None] / safe


def _norm(coefficients: Vector, units: Matrix) -> float:
    return float((coefficients @ units @ coefficients).clamp(min=0).sqrt())


def _unscale(coefficients: Vector, norms: Vector) -> Vector:
    """Return the factors of the tensors from those of their unit vectors."""
    return coefficients / torch.where(norms == 0, 1.0, norms)


def _mean_tangent(mean: Vector, parts: Vector, units: Matrix) -> Vector:
    """Return the weighted mean of the tangent vectors at a point that lead to the unit vectors."""
    cosines = (units @ mean).clamp(-1, 1)
    angles = cosines.acos()
    factors = parts * torch.where(angles == 0, 1.0, angles / angles.sin().clamp(min=torch.finfo(angles.dtype).tiny))
    return factors - (factors @ cosines) * mean
