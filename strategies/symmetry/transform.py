"""A transform: one group element for every space, acting on whole updates.

    theta -> g . theta        G -> T G T^T        F -> F[p] / a^2

Statistics are transformed with the weights: `act` transforms parameters, `act_on_inputs` a Gram matrix of the inputs
of a layer, and `act_on_squares` a diagonal of squared gradients. A diagonal can follow permutations, signs and
scales, but a rotation would make it dense; `mixes` tells which tensors that concerns.
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
    """A symmetry with one element per space; spaces without an element stay as they are.

    Laws: `g.inverse().act(g.act(s)) == s`, `g.after(h).act(s) == g.act(h.act(s))`, and `act` keeps the function of the
    model.

    Attributes:
        symmetry: the spaces.
        elements: elements by the names of their spaces.
    """

    symmetry: Symmetry
    elements: Mapping[str, Element]

    @property
    def is_identity(self) -> bool:
        """True if no space is changed."""
        return all(element.is_identity for element in self.elements.values())

    def act(self, state: State) -> dict[str, Tensor]:
        """Return the transformed state, in which tensors that no space touches are the same objects.

        Names that share a tensor still share it afterwards, if the transform acts alike on all of them.
        """
        return _act(self.symmetry, self.elements, state)

    def act_on_squares(self, squares: State) -> dict[str, Tensor]:
        """Transform squared gradients as their parameters require, `F -> F[p] / a^2`.

        Args:
            squares: squared gradients by the names of their parameters, none of which `mixes` may be true of.
        """
        # A gradient transforms by the inverse transpose of its parameter's map, which `squared` accounts for.
        squared = {name: element.squared() for name, element in self.elements.items()}
        return _act(self.symmetry, squared, squares)

    def act_on_inputs(self, tensor: str, gram: Tensor, inputs: int, dim: int = 1) -> Tensor:
        """Transform the Gram matrix of a layer's inputs, `G -> T G T^T`.

        Args:
            tensor: name of the layer's weight.
            gram: matrix `[n, n]`, or `[n + 1, n + 1]` with the column of ones last.
            inputs: number of input channels of the weight, a divisor of n (a convolution has a run for each).
            dim: dimension of the weight that reads its inputs: 1, or 0 if it is stored `[in, out]`, as in GPT-2.
        """
        run = gram.shape[0] // inputs
        for element, axis in self._readers(tensor, dim):
            start, stop = axis.part or (0, inputs)
            period = axis.period and axis.period * run
            # A weight reads its space on the dual of the role on which the features are.
            part, role = (start * run, stop * run), element.dual(axis.role)
            # The element acts on both sides of the Gram matrix, but not on its row and column of ones.
            for side in (0, 1):
                gram = Axis(tensor, side, part, role, period=period).act(element, gram)
        return gram

    def mixes(self, tensor: str) -> bool:
        """Return whether a rotation acts on the tensor, so that no diagonal statistic can follow it."""
        return any(
            not self.elements[space.name].is_monomial
            for space in self.symmetry.spaces
            if space.name in self.elements
            for axis in space.axes
            if axis.tensor == tensor
        )

    def inverse(self) -> "Transform":
        """Return the transform that undoes this one."""
        return Transform(self.symmetry, {n: e.inverse() for n, e in self.elements.items()})

    def after(self, earlier: "Transform") -> "Transform":
        """Return the product in which `earlier` acts first and this transform second."""
        both = self.elements.keys() & earlier.elements.keys()
        # A space without an element is as it was, so the only element of a space is its product.
        products = {name: self.elements[name].after(earlier.elements[name]) for name in both}
        return Transform(self.symmetry, {**earlier.elements, **self.elements, **products})

    def _readers(self, tensor: str, dim: int) -> list[tuple[Element, Axis]]:
        return [
            (self.elements[space.name], axis)
            for space in self.symmetry.spaces
            if space.name in self.elements
            for axis in space.axes
            if axis.tensor == tensor and axis.dim == dim
        ]


def _act(symmetry: Symmetry, elements: Mapping[str, Element], state: State) -> dict[str, Tensor]:
    actions = _actions(symmetry, elements, state)
    first_names = tied({name: state[name] for name in actions})
    result = dict(state)
    for name, action in actions.items():
        first_name = first_names[name]
        # A tied tensor is transformed once, so that its names share one tensor afterwards.
        if first_name != name and _are_alike(action, actions[first_name]):
            result[name] = result[first_name]
            continue
        for element, axis in action:
            result[name] = axis.act(element, result[name])
    return result


_Action = list[tuple[Element, Axis]]


def _actions(symmetry: Symmetry, elements: Mapping[str, Element], state: State) -> dict[str, _Action]:
    """Return for each tensor the elements that act on it and their axes, in the order of the spaces."""
    result: dict[str, _Action] = {}
    for space in symmetry.spaces:
        for axis in space.axes if space.name in elements else ():
            if axis.tensor in state:
                result.setdefault(axis.tensor, []).append((elements[space.name], axis))
    return result


def _are_alike(a: _Action, b: _Action) -> bool:
    """Return whether a transform acts alike on two names of one tensor, so that it may stay one tensor."""
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(
        e is f and replace(m, tensor="", scored=True) == replace(n, tensor="", scored=True) for (e, m), (f, n) in pairs
    )


def identity(symmetry: Symmetry) -> Transform:
    """Return the transform that changes nothing."""
    return Transform(symmetry, {space.name: space.group.identity() for space in symmetry.spaces})


def random(symmetry: Symmetry, generator: torch.Generator) -> Transform:
    """Draw a uniformly distributed transform, for checks and for problems with a known solution."""
    drawn = {space.name: space.group.random(generator) for space in symmetry.spaces}
    return Transform(symmetry, drawn)
