"""Singular-vector alignment: whether the dominant directions of two models' layers are the same. Data-free.

    R_gamma = sum_l sum_{i in I_l^a, j in I_l^b} (u_i^a . u_j^b)(v_i^a . v_j^b)  /  sum_l n_l

with `I_l = {i : s_i >= gamma s_1}` the directions of layer l that its largest singular values give, and
`n_l = sqrt(|I_l^a| |I_l^b|)`, which is the number of directions where both models retain as many and keeps R at
most 1 where they do not. Permutations and rotations leave singular values alone, so matching can only turn
directions, and it turns the dominant ones towards each other.

Source: Ito et al. 2024, arXiv 2402.04051, who report gamma = 0 and 0.3.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch
from jaxtyping import Float
from scipy.sparse.linalg import svds
from torch import Tensor

from fedbasin.strategies.tensors.state import State, floating


@dataclass(frozen=True)
class SpectralAlignment:
    """R of every layer and of all together.

    Attributes:
        layers: R by the name of the weight, from -1 to 1: 1 for equal directions, about 0 for unrelated ones.
            Layers that are zero in one of the models have none.
        total: R over all layers, each counted by the directions that it retains.
    """

    layers: Mapping[str, float]
    total: float


def spectral_alignment(
    a: State,
    b: State,
    gamma: float = 0.3,
    rank: int | None = None,
    layers: Collection[str] | None = None,
) -> SpectralAlignment:
    """R between two models, in float64.

    Laws: symmetric in the models; 1 for equal ones and for one that is the other scaled layer by layer; the
    same after any transform that acts on both.

    Args:
        a: one model.
        b: the other, after its alignment: R does not search.
        gamma: share of the largest singular value below which a direction is left out; 0 keeps all of rank.
        rank: most directions of a layer, for wide models; None decomposes the layers completely.
        layers: names of weights to compare; None takes every floating tensor of two axes or more, such as
            `[out, in]` or `[out, in, height, width]`, as a matrix `[out, rest]`.

    Raises:
        ValueError: gamma outside [0, 1], a rank below 1, other shapes, or nothing to compare.
    """
    if not 0 <= gamma <= 1 or (rank is not None and rank < 1):
        raise ValueError(
            f"gamma = {gamma}, rank = {rank}; choose gamma in [0, 1] and a positive rank"
        )
    agreements: dict[str, float] = {}
    counts: dict[str, float] = {}
    for name in (n for n in matrices(a) if n in b) if layers is None else layers:
        ours, theirs = (_directions(_matrix(name, state), gamma, rank) for state in (a, b))
        if counted := math.sqrt(ours[0].shape[1] * theirs[0].shape[1]):
            agreements[name], counts[name] = _agreement(ours, theirs), counted
    if not counts:
        raise ValueError(
            "no layer has a direction in both models; pass weights of two axes or more"
        )
    total = math.fsum(agreements.values()) / math.fsum(counts.values())
    return SpectralAlignment({n: agreements[n] / counts[n] for n in counts}, total)


def affordable(state: State, products: int) -> list[str]:
    """The names of the matrices that a budget pays for, the cheapest first.

    A decomposition costs in proportion to the products that multiplying `[out, rest]` by its shorter side takes;
    2^24 of them, a matrix of 256 x 256, take about 0.05 s on one core.
    """
    costs = sorted((m.numel() * min(m.flatten(1).shape), n) for n, m in matrices(state).items())
    within = takewhile(lambda total: total <= products, accumulate(cost for cost, _ in costs))
    return [name for _, (_, name) in zip(within, costs, strict=False)]


def matrices(state: State) -> dict[str, Tensor]:
    """What has singular vectors: floating tensors of two axes or more."""
    return {name: tensor for name, tensor in floating(state).items() if tensor.ndim > 1}


Directions = tuple[Float[Tensor, "out kept"], Float[Tensor, "rest kept"]]


def _matrix(name: str, state: State) -> Float[Tensor, "out rest"]:
    if name not in state or state[name].ndim < 2:
        raise ValueError(f"{name!r} is no weight of two axes or more; name weights of the model")
    return state[name].detach().flatten(1).double()


def _directions(matrix: Float[Tensor, "out rest"], gamma: float, rank: int | None) -> Directions:
    """The left and right singular vectors that count, as columns."""
    left, values, right = _decomposed(matrix, rank)
    # Directions of a zero singular value are an arbitrary basis of the null space.
    floor = max(gamma, max(matrix.shape) * torch.finfo(matrix.dtype).eps)
    kept = (values > 0) & (values >= floor * (1 - 1e-12) * values.max())
    return left[:, kept], right[kept].mT


def _decomposed(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if rank is None or rank >= min(matrix.shape) or not matrix.any():
        return torch.linalg.svd(matrix, full_matrices=False)
    # Lanczos with a fixed start, so that the same models give the same number.
    start = torch.ones(min(matrix.shape), dtype=torch.float64).numpy()
    factors = svds(matrix.cpu().numpy(), k=rank, v0=start)
    left, values, right = (torch.from_numpy(f.copy()).to(matrix.device) for f in factors)
    return left, values, right


def _agreement(a: Directions, b: Directions) -> float:
    """`<U_a^T U_b, V_a^T V_b>`: vectors of one pair change sign together, so signs cancel.

    Raises:
        ValueError: The layers have other shapes.
    """
    for ours, theirs in zip(a, b, strict=True):
        if len(ours) != len(theirs):
            raise ValueError(
                f"layers with {len(ours)} and {len(theirs)} rows; compare two models of one architecture"
            )
    return float(((a[0].mT @ b[0]) * (a[1].mT @ b[1])).sum())
