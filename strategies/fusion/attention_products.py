"""Fusion of attention heads by the products of their projections, for models that are aligned.

    A_k^T B_k       queries and keys of one head of client k, or its values and outputs, each with its bias
    U S V^T         the d largest singular values and vectors of sum_k w_k A_k^T B_k, for a head of d dimensions
    A, B            M S^(1/2) U^T and M^-T S^(1/2) V^T

A head computes with its two projections only by their product, and a mean of factors is no mean of products. M is the
invertible map that leads A nearest to the mean of the A_k, so that models with equal heads keep their factors. No data is
read, and shapes stay. It is exact for attention without an operation between projection and product, as a norm of queries
would be.

Sources: the symmetry of the factors of a product, Bhojanapalli et al. 2021, arXiv 2106.08823; means of products for low-rank
adapters, Sun et al. 2024, arXiv 2403.12313, and Wang et al. 2024 (FLoRA), arXiv 2409.05976.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Wreath
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry
from fedbasin.strategies.tensors.state import State

# A map that is nearly singular would put all of a product's size into one factor; a rotation takes its place.
_MOST_CONDITION = 1e3
_SMALLEST = 1e-12

Side = tuple[Axis, ...]


def fuse_products(
    symmetry: Symmetry, mean: State, models: Sequence[State], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return the mean of aligned models with the heads that the means of their products give.

    Args:
        symmetry: the symmetry of the model; spaces with rotations of heads say what belongs together.
        mean: the weighted mean of the models, whose other tensors are kept.
        models: the models, aligned to each other.
        weights: weight of each model; only their ratios count.
    """
    fused = dict(mean)
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    for space, role, sides in products(symmetry):
        factors = [torch.stack([_heads(space, role, side, model) for model in models]) for side in sides]
        means = [_heads(space, role, side, mean) for side in sides]
        for side, rows in zip(sides, _split(shares, *factors, *means), strict=True):
            _write(fused, side, rows)
    return fused


def products(symmetry: Symmetry) -> Iterator[tuple[Space, int, tuple[Side, Side]]]:
    """Yield the products of a model's heads: the space, the role, and the axes of each of the two factors."""
    for space in symmetry.spaces:
        for role in rotating_roles(space.group):
            sides = _sides(space, role)
            if len(sides) == 2:
                yield space, role, (sides[0], sides[1])


def rotating_roles(group: Group) -> list[int]:
    """Return the roles on which heads turn by any rotation; positions leave a rotary role only some of them."""
    if not isinstance(group, Wreath):
        return []
    owners = [inner for inner in group.inners for _ in inner.widths]
    return [role for role, inner in enumerate(owners) if isinstance(inner, Orthogonal) and inner.size > 1]


def _sides(space: Space, role: int) -> list[Side]:
    """Return the axes of a role, by the projection that they belong to."""
    sides: dict[tuple[object, ...], list[Axis]] = {}
    for axis in space.axes:
        if axis.role == role:
            module = axis.tensor.rpartition(".")[0]
            sides.setdefault((module, axis.part, axis.period, axis.outer), []).append(axis)
    return [tuple(axes) for axes in sides.values()]


def _heads(space: Space, role: int, side: Side, model: State) -> Float[Tensor, "heads size columns"]:
    rows = [axis.rows(model[axis.tensor], space.width(role)).double() for axis in side]
    return torch.cat(rows, 1).unflatten(0, (space.group.count, -1))


def _split(shares: Tensor, first: Tensor, second: Tensor, mean: Tensor, other_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of the mean product of each head, `[heads, size, columns]`.

    Args:
        shares: weights of the models.
        first: factors `[models, heads, size, columns]`.
        second: the other factors.
        mean: mean of the first factors.
        other_mean: mean of the second ones.
    """
    size = mean.shape[1]
    # The product itself is as large as the layer for every head; the factors of all models are not.
    bases, cores = zip(
        *(
            torch.linalg.qr((shares.sqrt()[:, None, None, None] * f).movedim(0, 1).flatten(1, 2).mT)
            for f in (first, second)
        ),
        strict=True,
    )
    u, s, vh = torch.linalg.svd(cores[0] @ cores[1].mT)
    root = s[:, :size].sqrt()[..., None]
    left = root * (bases[0] @ u[..., :size]).mT
    right = root * (bases[1] @ vh.mT[..., :size]).mT
    smallest = s[:, :1, None] * _SMALLEST + torch.finfo(s.dtype).tiny
    gauge = mean @ (left / torch.maximum(s[:, :size, None], smallest)).mT
    rotation_u, values, rotation_v = torch.linalg.svd(gauge)
    is_sound = (values[:, -1] * _MOST_CONDITION > values[:, 0])[:, None, None]
    nearest_u, _, nearest_v = torch.linalg.svd(mean @ left.mT + other_mean @ right.mT)
    identity = torch.eye(size, dtype=s.dtype)
    safe = torch.where(is_sound, rotation_u * values[:, None] @ rotation_v, nearest_u @ nearest_v)
    inverse = torch.linalg.solve(safe, identity.expand_as(safe))
    return safe @ left, inverse.mT @ right


def _write(model: dict[str, Tensor], side: Side, heads: Float[Tensor, "heads size columns"]) -> None:
    rows, start = heads.flatten(0, 1), 0
    for axis in side:
        tensor = model[axis.tensor]
        columns = axis.rows(tensor, len(rows)).shape[1]
        model[axis.tensor] = axis.replace(tensor, rows[:, start : start + columns])
        start += columns
