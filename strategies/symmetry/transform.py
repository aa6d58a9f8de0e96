"""A transform: one group element for every site, acting on whole updates.

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
from fedbasin.strategies.symmetry.symmetry import Member, Symmetry
from fedbasin.strategies.tensors.state import State, tied


@dataclass(frozen=True, eq=False)
class Transform:
    """One element per site; sites without an entry stay as they are.

    Laws: `g.inverse().act(g.act(s)) == s`, `g.after(h).act(s) == g.act(h.act(s))`, and `act` keeps the
    model's function.
    """

    symmetry: Symmetry
    elements: Mapping[str, Element]

    @property
    def is_identity(self) -> bool:
        """Whether no site is changed."""
        return all(element.is_identity for element in self.elements.values())

    def act(self, state: State) -> dict[str, Tensor]:
        """The transformed state; tensors that no site touches are the same objects.

        Names of one tensor share their memory afterwards too, if they move alike.
        """
        return _acted(self.symmetry, self.elements, state)

    def act_on_squares(self, squares: State) -> dict[str, Tensor]:
        """Move squared gradients with the parameters that they are named after, `F -> F[p] / a^2`.

        No tensor may be one that `mixes` is true of.
        """
        squared = {name: element.squared() for name, element in self.elements.items()}
        return _acted(self.symmetry, squared, squares)

    def act_on_inputs(self, tensor: str, gram: Tensor, inputs: int, axis: int = 1) -> Tensor:
        """Move a Gram matrix with the layer whose inputs it sums, `G -> T G T^T`.

        What reads a space is on the dual of the leg that the space's features are on.

        Args:
            tensor: name of the layer's weight.
            gram: `[n, n]`, or `[n + 1, n + 1]` with the ones column last.
            inputs: input channels of the weight, a divisor of n (a convolution has a run for each).
            axis: the axis of the weight that reads: 1, or 0 where it is stored `[in, out]`, as in GPT-2.
        """
        owned = gram.shape[0] // inputs
        for element, member in self._readers(tensor, axis):
            start, stop = member.part or (0, inputs)
            period = member.period and member.period * owned
            part, leg = (start * owned, stop * owned), element.dual(member.leg)
            for side in (0, 1):
                gram = Member(tensor, side, part, leg, period=period).act(element, gram)
        return gram

    def mixes(self, tensor: str) -> bool:
        """Whether a rotation touches the tensor, so that no diagonal can follow it."""
        return any(
            not self.elements[site.name].is_monomial
            for site in self.symmetry.sites
            if site.name in self.elements
            for member in site.members
            if member.tensor == tensor
        )

    def inverse(self) -> "Transform":
        """The transform that undoes this one."""
        return Transform(self.symmetry, {n: e.inverse() for n, e in self.elements.items()})

    def after(self, first: "Transform") -> "Transform":
        """The product: `first` acts, then `self`."""
        both = self.elements.keys() & first.elements.keys()
        products = {name: self.elements[name].after(first.elements[name]) for name in both}
        return Transform(self.symmetry, {**first.elements, **self.elements, **products})

    def _readers(self, tensor: str, axis: int) -> list[tuple[Element, Member]]:
        return [
            (self.elements[site.name], member)
            for site in self.symmetry.sites
            if site.name in self.elements
            for member in site.members
            if member.tensor == tensor and member.axis == axis
        ]


def _acted(symmetry: Symmetry, elements: Mapping[str, Element], state: State) -> dict[str, Tensor]:
    moves = _moves(symmetry, elements, state)
    first = tied({name: state[name] for name in moves})
    result = dict(state)
    for name, acts in moves.items():
        if first[name] != name and _alike(acts, moves[first[name]]):
            result[name] = result[first[name]]
            continue
        for element, member in acts:
            result[name] = member.act(element, result[name])
    return result


_Acts = list[tuple[Element, Member]]


def _moves(symmetry: Symmetry, elements: Mapping[str, Element], state: State) -> dict[str, _Acts]:
    """What acts on each tensor, in the order of the sites."""
    result: dict[str, _Acts] = {}
    for site in symmetry.sites:
        for member in site.members if site.name in elements else ():
            if member.tensor in state:
                result.setdefault(member.tensor, []).append((elements[site.name], member))
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
    return Transform(symmetry, {site.name: site.group.identity() for site in symmetry.sites})


def random(symmetry: Symmetry, generator: torch.Generator) -> Transform:
    """A uniformly drawn transform, for checks and planted problems."""
    drawn = {site.name: site.group.random(generator) for site in symmetry.sites}
    return Transform(symmetry, drawn)
