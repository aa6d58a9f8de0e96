"""A state under a transform, moved tensor by tensor as it is asked for.

Nothing is copied until it is read, so a state that is read from a file stays there, and a tensor that several
spaces move, or one space several times, is rounded once.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Axis, Symmetry
from fedbasin.strategies.tensors.state import State


class Moved(Mapping[str, Tensor]):
    """`transform.act(state)`, lazily.

    Attributes:
        elements: of the spaces that have moved, by name; `moved[name]` is by those that are there when it is read.
    """

    def __init__(self, symmetry: Symmetry, state: State, elements: dict[str, Element]) -> None:
        self.elements = elements
        self._state = state
        self._axes: dict[str, list[tuple[str, Axis]]] = {}
        for space in symmetry.spaces:
            for axis in space.axes:
                self._axes.setdefault(axis.tensor, []).append((space.name, axis))

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        for space, axis in self._axes.get(name, ()):
            if space in self.elements:
                tensor = axis.act(self.elements[space], tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def is_touched(self, name: str) -> bool:
        """Whether the tensor is another one than in the state."""
        return any(space in self.elements for space, _ in self._axes.get(name, ()))
