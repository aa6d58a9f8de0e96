"""Barriers among more than two models: of every pair, from the fused model to every client, and in their simplex.

    gap(l) = L(sum_k l_k theta_k) - sum_k l_k L(theta_k)        l_k >= 0,  sum_k l_k = 1

The barrier of a set of models is the supremum of the gap over the simplex. Searching a simplex is not affordable. The
number here is a lower bound: the largest gap among the vertices (always zero), the middles of the edges, and the
weights of the fusion. Linear connectivity of many models at once: Sharma et al. 2024, arXiv 2404.06498.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from fedbasin.strategies.diagnostics.barrier import Evaluate, Path, Sums, grid
from fedbasin.strategies.tensors.state import State, interpolate


@dataclass(frozen=True)
class PairPath:
    """The path from model `a` (t = 0) to model `b` (t = 1)."""

    a: str
    b: str
    path: Path


def pairwise(states: Mapping[str, State], evaluate: Evaluate, points: int) -> Iterator[PairPath]:
    """Evaluate the path between every two models, one pair at a time.

    At most two states are in memory if the mapping reads them from disk. Every model is evaluated once and every pair at
    its inner points, which makes `K + (points - 2) K (K - 1) / 2` evaluations.

    Raises:
        ValueError: there are fewer than two points, or the evaluations are not over the same data.
    """
    steps = grid(points)
    ends = {name: evaluate(states[name]) for name in states}
    # States are read again for every pair, so that two of them fit in memory where all do not.
    for a, b in combinations(states, 2):
        yield PairPath(a, b, _evaluate_path(states[a], states[b], (ends[a], ends[b]), evaluate, steps))


def from_fused(
    fused: State, states: Mapping[str, State], evaluate: Evaluate, points: int
) -> Iterator[tuple[str, Path]]:
    """Evaluate the path from the fused model (t = 0) to every client's (t = 1), one client at a time.

    Raises:
        ValueError: there are fewer than two points, or the evaluations are not over the same data.
    """
    steps = grid(points)
    start = evaluate(fused)
    for name in states:
        state = states[name]
        yield name, _evaluate_path(fused, state, (start, evaluate(state)), evaluate, steps)


def _evaluate_path(a: State, b: State, ends: tuple[Sums, Sums], evaluate: Evaluate, steps: tuple[float, ...]) -> Path:
    inner = [evaluate(interpolate(a, b, t)) for t in steps[1:-1]]
    return Path.of(steps, [ends[0], *inner, ends[1]])


@dataclass(frozen=True)
class Simplex:
    """Gaps inside the simplex that some models span, nats per example; negative where mixing helps.

    Attributes:
        fusion: gap at the weights of the fusion.
        middles: gap at the middle of every edge, by the names of its ends.
    """

    fusion: float
    middles: Mapping[tuple[str, str], float]

    @property
    def barrier(self) -> float:
        """The largest gap; never negative, as it is zero at the vertices."""
        return max(0.0, self.fusion, *self.middles.values())


def simplex(states: Mapping[str, State], weights: Mapping[str, float], evaluate: Evaluate) -> Simplex:
    """Compute the gaps at the fusion's weights and at the middle of every edge.

    Args:
        states: the models; at most two are in memory, beside one sum.
        weights: weights of the fusion, such as numbers of examples; they are scaled to sum to one.
        evaluate: returns sums over the same examples for every state.

    Raises:
        ValueError: weights are negative or all zero, or belong to other models.
    """
    shares = _normalised_weights(states, weights)
    losses = {name: _mean_loss(evaluate(states[name])) for name in states}
    fused = _mean_loss(evaluate(_weighted_mean(states, shares)))
    middles = {
        (a, b): _mean_loss(evaluate(interpolate(states[a], states[b], 0.5))) - (losses[a] + losses[b]) / 2
        for a, b in combinations(states, 2)
    }
    return Simplex(fused - math.fsum(shares[n] * losses[n] for n in states), middles)


def _normalised_weights(states: Mapping[str, State], weights: Mapping[str, float]) -> dict[str, float]:
    if not states or states.keys() != weights.keys():
        raise ValueError(f"models {sorted(states)} and weights of {sorted(weights)}; give one weight to each model")
    total = math.fsum(weights.values())
    if not 0 < total < math.inf or min(weights.values()) < 0:
        raise ValueError(f"weights {dict(weights)}; give non-negative numbers that are not all zero")
    return {name: weight / total for name, weight in weights.items()}


def _weighted_mean(states: Mapping[str, State], shares: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the weighted mean, rounded once; tensors that are not floating come from one of the models."""
    template = states[next(iter(states))]
    # In double, so that the sum over many clients is rounded once and not at every addition.
    sums = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in template.items() if t.is_floating_point()}
    for name in states:
        state = states[name]
        for tensor, total in sums.items():
            total.add_(state[tensor].double(), alpha=shares[name])
    return {n: sums[n].to(t.dtype) if n in sums else t for n, t in template.items()}


def _mean_loss(sums: Sums) -> float:
    loss, _, examples = sums
    if not examples:
        raise ValueError("a model was evaluated on no examples; evaluate it on some data")
    return loss / examples
