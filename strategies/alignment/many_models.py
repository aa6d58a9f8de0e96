"""Many models at once: each to the mean of the others, or all pairs to one frame in which they agree.

MergeMany (Ainsworth et al. 2023, arXiv 2209.04836, algorithm 3):

    g_k  <-  align(theta_k -> mean of g_j . theta_j, j != k)        until nobody comes closer

Synchronisation of pairs (Pachauri, Kondor and Singh 2013; the universe of C2M3, Crisostomi et al. 2024, arXiv
2405.17897): pairwise elements T_pq, which take q into p's frame, contradict each other around a cycle. Maps U_p into
one universe,

    maximise  sum_pq <U_p T_pq, U_q>        by  U_q <- argmax_U <U, sum_p U_p T_pq>

cannot: what they say of a pair, `U_p^-1 U_q`, composes to the identity around every cycle, exactly. Both need all
models in one place, so neither streams.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations

import torch
from torch import Tensor

from fedbasin.strategies.alignment.weight_matching import Alignment, find_by_weights, match_weights
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry
from fedbasin.strategies.symmetry.transform import Transform, identity
from fedbasin.strategies.tensors.state import State

Pairs = Mapping[tuple[int, int], Transform]
"""For (p, q) the transform that takes model q into the frame of model p."""

# A pass that brings nobody closer by this share is the last.
_PROGRESS = 1e-6


def match_many(
    symmetry: Symmetry, models: Sequence[State], *, max_passes: int = 20
) -> list[Transform]:
    """The transforms under which every model is as close as it can be to the mean of the others.

    Laws: no pass raises the sum of squared distances between the models; equal models in any frames come together.

    Args:
        symmetry: the spaces; the models are folded already.
        models: at least two.
        max_passes: bound on the passes over all models.

    Raises:
        ValueError: there are fewer than two models.
    """
    _require_two(models)
    states, found = [dict(model) for model in models], [identity(symmetry) for _ in models]
    for _ in range(max_passes):
        moved = [_improve(symmetry, states, found, k) for k in range(len(models))]
        if not any(moved):
            break
    return found


def _improve(
    symmetry: Symmetry, states: list[dict[str, Tensor]], found: list[Transform], k: int
) -> bool:
    """Align one model to the mean of the others, in place; whether it came closer."""
    others = [state for j, state in enumerate(states) if j != k]
    step = match_weights(symmetry, _mean(others), states[k])
    if _is_idle(step):
        return False
    states[k], found[k] = step.state, step.transform.after(found[k])
    return True


def _is_idle(step: Alignment) -> bool:
    report = step.report
    return report.distance_after >= report.distance_before * (1 - _PROGRESS)


def match_pairs(symmetry: Symmetry, models: Sequence[State]) -> dict[tuple[int, int], Transform]:
    """Weight matching of every pair; going there and back is the identity, going round a cycle need not be."""
    found: dict[tuple[int, int], Transform] = {}
    for p, q in permutations(range(len(models)), 2):
        if p < q:
            found[p, q] = find_by_weights(symmetry, models[p], models[q]).transform
            found[q, p] = found[p, q].inverse()
    return found


def synchronise(
    symmetry: Symmetry, pairs: Pairs, count: int, *, max_passes: int = 50
) -> list[Transform]:
    """Maps of `count` models into one universe, from what pairs say of each other.

    Laws: pairs that do not contradict each other are kept exactly where they permute; `U_p^-1 U_q` is
    cycle-consistent whatever the pairs are; the first model's map is the identity, so its frame is the universe.

    Args:
        symmetry: the spaces; their elements keep lengths (groups that stretch are left to weight matching).
        pairs: one transform for every ordered pair.
        count: number of models.
        max_passes: bound on the passes over all models, at each space.

    Raises:
        ValueError: a pair is missing.
    """
    missing = [pair for pair in permutations(range(count), 2) if pair not in pairs]
    if missing:
        raise ValueError(f"no transform for the pair {missing[0]}; match every ordered pair")
    by_space = {
        space.name: _synchronised(space, pairs, count, max_passes) for space in symmetry.spaces
    }
    return [
        Transform(symmetry, {name: maps[model] for name, maps in by_space.items()})
        for model in range(count)
    ]


def _synchronised(space: Space, pairs: Pairs, count: int, max_passes: int) -> list[Element]:
    maps = [space.group.identity(), *(pairs[0, q].elements[space.name] for q in range(1, count))]
    for _ in range(max_passes):
        before = list(maps)
        for q in range(1, count):
            maps[q] = _voted(space, pairs, maps, q)
        if all(old is new for old, new in zip(before, maps, strict=True)):
            break
    return maps


def _voted(space: Space, pairs: Pairs, maps: list[Element], q: int) -> Element:
    """The map of model q that the others' maps and their pairs with it ask for; the one it has where that ties."""
    votes = [maps[p].after(pairs[p, q].elements[space.name]) for p in range(len(maps)) if p != q]
    scores = []
    for role in range(len(space.group.sizes)):
        eye = torch.eye(space.width(role), dtype=torch.float64)
        total = torch.stack([vote.act(eye, 0, role) for vote in votes]).sum(0)
        scores.append(space.group.score(total, eye, role))
    best = space.group.maximiser(tuple(scores), prior=0.0)
    held = maps[q]
    rises = space.group.value(tuple(scores), best) - space.group.value(tuple(scores), held)
    return best if rises > _PROGRESS else held


def _mean(states: Sequence[State]) -> dict[str, Tensor]:
    """Of floating tensors; the first model's others."""
    first = states[0]
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }


def _require_two(models: Sequence[State]) -> None:
    if len(models) < 2:
        raise ValueError(f"{len(models)} models; many are at least two")
