"""Singular-vector alignment: measure whether the dominant directions of two models' layers agree. Needs no data.

    R_gamma = sum_l sum_{i in I_l^a, j in I_l^b} (u_i^a . u_j^b)(v_i^a . v_j^b)  /  sum_l n_l

with `I_l = {i : s_i >= gamma s_1}` the directions of layer l with the largest singular values and
`n_l = sqrt(|I_l^a| |I_l^b|)`. That is the number of directions where both models retain equally many, and it keeps R at
most 1 where they do not. Permutations and rotations keep singular values, so matching can only rotate directions, and it
brings the dominant ones together.

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
    """R of every layer and of all layers together.

    Attributes:
        layers: R by the name of the weight, from -1 to 1: 1 for equal directions, about 0 for unrelated ones.
            Layers that are zero in one of the models have no entry.
        total: R over all layers, each weighted by the number of directions that it retains.
    """

    layers: Mapping[str, float]
    total: float


def spectral_alignment(
    a: State, b: State, gamma: float = 0.3, rank: int | None = None, layers: Collection[str] | None = None
) -> SpectralAlignment:
    """Compute R between two models, in float64.

    Laws: symmetric in the models; 1 where one model is the other scaled layer by layer; unchanged by any transform that
    acts on both.

    Args:
        a: one model.
        b: the other model, already aligned: R does not search.
        gamma: fraction of the largest singular value below which a direction is left out; 0 keeps the whole rank.
        rank: largest number of directions of a layer, for wide models; None decomposes layers completely.
        layers: names of weights to compare; None takes every floating tensor of two axes or more, such as
            `[out, in]` or `[out, in, height, width]`, as a matrix `[out, rest]`.

    Raises:
        ValueError: gamma is outside [0, 1], rank is below 1, shapes differ, or there is nothing to compare.
    """
    if not 0 <= gamma <= 1 or (rank is not None and rank < 1):
        raise ValueError(f"gamma = {gamma}, rank = {rank}; choose gamma in [0, 1] and a positive rank")
    agreements: dict[str, float] = {}
    counts: dict[str, float] = {}
    for name in (n for n in matrices(a) if n in b) if layers is None else layers:
        pair = [_dominant_vectors(_matrix(name, state), gamma, rank) for state in (a, b)]
        if count := math.sqrt(math.prod(left.shape[1] for left, _ in pair)):
            agreements[name], counts[name] = _agreement(*pair), count
    if not counts:
        raise ValueError("no layer has a direction in both models; pass weights of two axes or more")
    total = math.fsum(agreements.values()) / math.fsum(counts.values())
    return SpectralAlignment({n: agreements[n] / counts[n] for n in counts}, total)


def affordable(state: State, products: int) -> list[str]:
    """Return the names of the matrices whose decomposition a budget of products allows, the cheapest first.

    The cost of decomposing `[out, rest]` is proportional to `out * rest * min(out, rest)` products. A matrix of
    256 x 256, 2^24 products, takes about 0.05 s on one core.
    """
    # The cheapest first, which covers the most layers.
    costs = sorted((m.numel() * min(m.flatten(1).shape), n) for n, m in matrices(state).items())
    within = takewhile(lambda total: total <= products, accumulate(cost for cost, _ in costs))
    return [name for _, (_, name) in zip(within, costs, strict=False)]


def matrices(state: State) -> dict[str, Tensor]:
    """Return the tensors that have singular vectors: floating ones of two axes or more."""
    return {name: tensor for name, tensor in floating(state).items() if tensor.ndim > 1}


SingularVectors = tuple[Float[Tensor, "out directions"], Float[Tensor, "rest directions"]]


def _matrix(name: str, state: State) -> Float[Tensor, "out rest"]:
    if name not in state or state[name].ndim < 2:
        raise ValueError(f"{name!r} is not a weight of two axes or more; name weights of the model")
    return state[name].detach().flatten(1).double()


def _dominant_vectors(matrix: Float[Tensor, "out rest"], gamma: float, rank: int | None) -> SingularVectors:
    """Return the left and right singular vectors above the threshold, as columns."""
    left, values, right = _decompose(matrix, rank)
    # Directions of a zero singular value are an arbitrary basis of the null space, so gamma = 0 must leave them out.
    floor = max(gamma, max(matrix.shape) * torch.finfo(matrix.dtype).eps)
    # The factor keeps the largest value itself at gamma = 1, whatever the product rounds to.
    dominant = (values > 0) & (values >= floor * (1 - 1e-12) * values.max())
    return left[:, dominant], right[dominant].mT


def _decompose(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if rank is None or rank >= min(matrix.shape) or not matrix.any():
        return torch.linalg.svd(matrix, full_matrices=False)
    # A fixed start for Lanczos, so that the same models give the same number; the default is random.
    start = torch.ones(min(matrix.shape), dtype=torch.float64).numpy()
    factors = svds(matrix.cpu().numpy(), k=rank, v0=start)
    left, values, right = (torch.from_numpy(f.copy()).to(matrix.device) for f in factors)
    return left, values, right


def _agreement(a: SingularVectors, b: SingularVectors) -> float:
    """Return `<U_a^T U_b, V_a^T V_b>`; a left and a right vector change sign together, so signs cancel.

    Raises:
        ValueError: the layers have different shapes.
    """
    for vectors_a, vectors_b in zip(a, b, strict=True):
        if len(vectors_a) != len(vectors_b):
            raise ValueError(
                f"layers with {len(vectors_a)} and {len(vectors_b)} rows; compare two models of one architecture"
            )
    return float(((a[0].mT @ b[0]) * (a[1].mT @ b[1])).sum())
