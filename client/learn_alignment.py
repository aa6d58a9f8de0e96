"""A client learns on its own data how its model is best aligned."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedbasin.client.data import Batches
from fedbasin.strategies.alignment.learned_matching import match_learned
from fedbasin.strategies.alignment.weight_matching import Alignment
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State

# Where nobody says what the two will be merged by.
_MIDDLE = 0.5


@dataclass(frozen=True)
class Afresh:
    """A client's batches, made anew each time that they are read."""

    data: Callable[[], Batches]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data())


def align_learned(
    symmetry: Symmetry,
    model: nn.Module,
    anchor: State,
    client: State,
    data: Callable[[], Batches],
    *,
    examples: float,
    merged_examples: float,
) -> Alignment:
    """`match_learned` at the place where the two will be merged.

    Args:
        symmetry: the spaces.
        model: lends its architecture.
        anchor: the state to align to.
        client: the state to align.
        data: gives the client's own examples, afresh at every call.
        examples: behind the client's state.
        merged_examples: behind the anchor; 0 where they are not known.
    """
    place = examples / (examples + merged_examples) if merged_examples and examples else _MIDDLE
    return match_learned(symmetry, model, anchor, client, Afresh(data), place)
