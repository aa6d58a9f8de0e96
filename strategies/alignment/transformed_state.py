"""A state under a transform, moved tensor by tensor as it is asked for.

Nothing is copied until it is read, so a state that is read from a file stays there, and a tensor that several
sites move, or one site several times, is rounded once.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Member, Symmetry
from fedbasin.strategies.tensors.state import State


class Moved(Mapping[str, Tensor]):
    """`transform.act(state)`, lazily.

    Attributes:
        elements: of the sites that have moved, by name; `moved[name]` is by those that are there when it is read.
    """

    def __init__(self, symmetry: Symmetry, state: State, elements: dict[str, Element]) -> None:
        self.elements = elements
        self._state = state
        self._members: dict[str, list[tuple[str, Member]]] = {}
        for site in symmetry.sites:
            for member in site.members:
                self._members.setdefault(member.tensor, []).append((site.name, member))

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        for site, member in self._members.get(name, ()):
            if site in self.elements:
                tensor = member.act(self.elements[site], tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def is_touched(self, name: str) -> bool:
        """Whether the tensor is another one than in the state."""
        return any(site in self.elements for site, _ in self._members.get(name, ()))
