"""Alignment of the models of a merge, each into the frame of the base model or of one another.

    star       every model to the first                  chain      every model to the mean of those before it
    tree       halves, and then one half to the other    universe   every model to the mean of the others, repeatedly

Every model keeps its function. `universe` is Algorithm 3 of Ainsworth et al. 2023, arXiv
2209.04836: as all maps go through one frame, they agree on cycles.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbasin.proto.report import AlignmentReport
from fedbasin.server.files.merge.recipe import Links
from fedbasin.strategies.alignment.transformed_state import TransformedState
from fedbasin.strategies.alignment.weight_matching import MatchResult
from fedbasin.strategies.fusion.rules.span import combine
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.symmetry.transform import Transform, identity
from fedbasin.strategies.tensors.state import State

# Rounds of `universe` if the models still move; on digit classifiers it ends after 3 to 5.
_MOST_ROUNDS = 10

# A round that brings no model closer by more than this is the last.
_LEAST_GAIN = 1e-4

Match = Callable[[State, State, float], MatchResult]
"""Finds the transform that takes its second state to its first, for a merge with this weight of the second."""


class MeanState(Mapping[str, Tensor]):
    """The mean of several states, whose tensors are computed when they are read."""

    def __init__(self, states: Sequence[State]) -> None:
        self._states = states

    def __getitem__(self, name: str) -> Tensor:
        tensors = [state[name] for state in self._states]
        if len(tensors) == 1 or not tensors[0].is_floating_point():
            return tensors[0]
        return combine(None, tensors, torch.full((len(tensors),), 1 / len(tensors)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._states[0])

    def __len__(self) -> int:
        return len(self._states[0])


@dataclass(frozen=True, eq=False)
class FoundTransforms:
    """The transforms that take models into one frame.

    Attributes:
        transforms: one for each model, in their order.
        reports: the reports of all searches, in their order.
    """

    transforms: list[Transform]
    reports: list[AlignmentReport]


def align_states(symmetry: Symmetry, states: Sequence[State], links: Links, match: Match) -> FoundTransforms:
    """Find the transforms that align models to one another.

    Args:
        symmetry: the symmetry of all models.
        states: the models, folded where the symmetry has folds; the first stays, but for `universe`.
        links: the order of the searches.
        match: the match of each.
    """
    search = _Search(symmetry, states, match)
    orders = {"star": search.star, "chain": search.chain, "tree": search.tree, "universe": search.universe}
    orders[links]()
    return FoundTransforms(search.transforms, search.reports)


class _Search:
    """The transforms of some models so far, which each search extends."""

    def __init__(self, symmetry: Symmetry, states: Sequence[State], match: Match) -> None:
        self.reports: list[AlignmentReport] = []
        self.transforms = [identity(symmetry)] * len(states)
        self._symmetry, self._states, self._match = symmetry, states, match

    def _state(self, number: int) -> State:
        elements = {n: e for n, e in self.transforms[number].elements.items() if not e.is_identity}
        return TransformedState(self._symmetry, self._states[number], elements) if elements else self._states[number]

    def star(self) -> None:
        for number in range(1, len(self._states)):
            self._move([number], [0])

    def chain(self) -> None:
        for number in range(1, len(self._states)):
            self._move([number], list(range(number)))

    def tree(self) -> None:
        self._merge_halves(list(range(len(self._states))))

    def universe(self) -> None:
        numbers = range(len(self._states))
        for _ in range(_MOST_ROUNDS):
            moves = [self._move([number], [rival for rival in numbers if rival != number]) for number in numbers]
            if not any(moves):
                return

    def _merge_halves(self, numbers: list[int]) -> None:
        if len(numbers) > 1:
            left, right = numbers[: (len(numbers) + 1) // 2], numbers[(len(numbers) + 1) // 2 :]
            self._merge_halves(left)
            self._merge_halves(right)
            self._move(right, left)

    def _move(self, moving: Sequence[int], anchors: Sequence[int]) -> bool:
        """Move some models together to the mean of others; return True if that brought them closer."""
        anchor, model = (MeanState([self._state(number) for number in numbers]) for numbers in (anchors, moving))
        result = self._match(anchor, model, len(moving) / (len(moving) + len(anchors)))
        self.reports.append(result.report)
        for number in moving:
            self.transforms[number] = result.transform.after(self.transforms[number])
        return result.report.distance_after < result.report.distance_before * (1 - _LEAST_GAIN)
