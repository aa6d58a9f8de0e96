"""A transform: one group element for every space, acting on whole updates.

    theta -> g . theta        G -> T G T^T        F -> F[p] / a^2

Statistics move with the weights, so a transform acts on parameters and precision alike (`act`,
`act_on_inputs` and `act_on_squares`). A diagonal follows permutations, signs and scales: under a rotation no
diagonal is right, so it is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.symmetry import Axis, Symmetry
from fedbasin.strategies.tensors.state import State, tied


@dataclass(frozen=True, eq=False)
class Transform:
    """One element per space; spaces without an entry stay as they are.

    Laws: `g.inverse().act(g.act(s)) == s`, `g.after(h).act(s) == g.act(h.act(s))`, and `act` keeps the
    model's function.
    """

    symmetry: Symmetry
    elements: Mapping[str, Element]

    @property
    def is_identity(self) -> bool:
        """Whether no space is changed."""
        return all(element.is_identity for element in self.elements.values())

    def act(self, state: State) -> dict[str, Tensor]:
        """The transformed state; tensors that no space touches are the same objects.

        Names of one tensor share their memory afterwards too, if they move alike.
        """
        return _acted(self.symmetry, self.elements, state)

    def act_on_squares(self, squares: State) -> dict[str, Tensor]:
        """Move squared gradients with the parameters that they are named after, `F -> F[p] / a^2`.

        No tensor may be one that `mixes` is true of.
        """
        squared = {name: element.squared() for name, element in self.elements.items()}
        return _acted(self.symmetry, squared, squares)

    def act_on_inputs(self, tensor: str, gram: Tensor, inputs: int, dim: int = 1) -> Tensor:
        """Move a Gram matrix with the layer whose inputs it sums, `G -> T G T^T`.

        What reads a space is on the dual of the role that the space's features are on.

        Args:
            tensor: name of the layer's weight.
            gram: `[n, n]`, or `[n + 1, n + 1]` with the ones column last.
            inputs: input channels of the weight, a divisor of n (a convolution has a run for each).
            dim: the axis of the weight that reads: 1, or 0 where it is stored `[in, out]`, as in GPT-2.
        """
        owned = gram.shape[0] // inputs
        for element, axis in self._readers(tensor, dim):
            start, stop = axis.part or (0, inputs)
            period = axis.period and axis.period * owned
            part, role = (start * owned, stop * owned), element.dual(axis.role)
            for side in (0, 1):
                gram = Axis(tensor, side, part, role, period=period).act(element, gram)
        return gram

    def mixes(self, tensor: str) -> bool:
        """Whether a rotation touches the tensor, so that no diagonal can follow it."""
        return any(
            not self.elements[space.name].is_monomial
            for space in self.symmetry.spaces
            if space.name in self.elements
            for axis in space.axes
            if axis.tensor == tensor
        )

    def inverse(self) -> "Transform":
        """The transform that undoes this one."""
        return Transform(self.symmetry, {n: e.inverse() for n, e in self.elements.items()})

    def after(self, first: "Transform") -> "Transform":
        """The product: `first` acts, then `self`."""
        both = self.elements.keys() & first.elements.keys()
        products = {name: self.elements[name].after(first.elements[name]) for name in both}
        return Transform(self.symmetry, {**first.elements, **self.elements, **products})

    def _readers(self, tensor: str, dim: int) -> list[tuple[Element, Axis]]:
        return [
            (self.elements[space.name], axis)
            for space in self.symmetry.spaces
            if space.name in self.elements
            for axis in space.axes
            if axis.tensor == tensor and axis.dim == dim
        ]


def _acted(symmetry: Symmetry, elements: Mapping[str, Element], state: State) -> dict[str, Tensor]:
    moves = _moves(symmetry, elements, state)
    first = tied({name: state[name] for name in moves})
    result = dict(state)
    for name, acts in moves.items():
        if first[name] != name and _alike(acts, moves[first[name]]):
            result[name] = result[first[name]]
            continue
        for element, axis in acts:
            result[name] = axis.act(element, result[name])
    return result


_Acts = list[tuple[Element, Axis]]


def _moves(symmetry: Symmetry, elements: Mapping[str, Element], state: State) -> dict[str, _Acts]:
    """What acts on each tensor, in the order of the spaces."""
    result: dict[str, _Acts] = {}
    for space in symmetry.spaces:
        for axis in space.axes if space.name in elements else ():
            if axis.tensor in state:
                result.setdefault(axis.tensor, []).append((elements[space.name], axis))
    return result


def _alike(one: _Acts, other: _Acts) -> bool:
    """Whether two names of one tensor move alike, so that they may stay one tensor."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(
        e is f and replace(m, tensor="", scored=True) == replace(n, tensor="", scored=True)
        for (e, m), (f, n) in pairs
    )


def identity(symmetry: Symmetry) -> Transform:
    """The transform that changes nothing."""
    return Transform(symmetry, {space.name: space.group.identity() for space in symmetry.spaces})


def random(symmetry: Symmetry, generator: torch.Generator) -> Transform:
    """A uniformly drawn transform, for checks and planted problems."""
    drawn = {space.name: space.group.random(generator) for space in symmetry.spaces}
    return Transform(symmetry, drawn)
