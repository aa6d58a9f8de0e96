"""A state under a transform whose tensors are computed when they are read.

Nothing is copied before it is read, so a state that lies in a file stays there. A tensor that several spaces act on,
or one space several times, is rounded once.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Axis, Symmetry
from fedbasin.strategies.tensors.state import State


class TransformedState(Mapping[str, Tensor]):
    """A lazy `transform.act(state)`.

    Attributes:
        elements: elements by space name; spaces without one stay as they are. A change here shows in the next tensor
            that is read.
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
        """Return True if an element acts on the tensor, so that it may differ from the one in the state."""
        return any(space in self.elements for space, _ in self._axes.get(name, ()))
