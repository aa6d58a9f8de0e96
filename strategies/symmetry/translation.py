"""Translations: biases of attention to which any vector may be added, because softmax is invariant to it.

    softmax_j(q_i . (k_j + c)) = softmax_j(q_i . k_j)                             b_K -> b_K + c
    sum_j p_ij (v_j + c) = sum_j p_ij v_j + c        as sum_j p_ij = 1           b_V -> b_V + c,  b_O -> b_O - W_O c

The first line holds where nothing stands between key and score: no rotary positions, no norm of keys, and no positions
that read keys. The second holds wherever the weights of attention sum to one: no sinks, no keys of zeros. Both are
groups of vectors under addition, and the vector that brings a client closest to the anchor solves a linear system,

    c = (I + W_O^T W_O)^-1 ((b_V^a - b_V) + W_O^T (b_O - b_O^a))

and is `b_K^a - b_K` for keys. A shift is written `+ key.bias` or `+ value.bias output.weight[axis] output.bias`,
where the axis is the one that reads values. After a bias that holds other entries too stands `[start:stop]` or
`[start:stop/period]`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.symmetry.symmetry_error import SymmetryError
from fedbasin.strategies.tensors.state import State

Vector = Float[Tensor, " width"]


@dataclass(frozen=True)
class Output:
    """The projection that reads values, and its bias, which compensates a shift of them."""

    weight: str
    axis: int
    bias: str

    def __str__(self) -> str:
        return f"{self.weight}[{self.axis}] {self.bias}"

    def matrix(self, state: State) -> Float[Tensor, "out width"]:
        """Return the projection in double precision, `[out, in]`."""
        weight = state[self.weight].double()
        return weight if self.axis == 1 else weight.mT


@dataclass(frozen=True)
class Shift:
    """A bias, or a part of it, to which any vector may be added.

    Attributes:
        bias: name of the bias.
        part: start and stop of its entries, or None for all of them.
        period: number of entries in a run, if the part is a part of every run.
        output: the projection that compensates the vector, or None for keys, which need no compensation.
    """

    bias: str
    part: tuple[int, int] | None = None
    period: int | None = None
    output: Output | None = None

    def __str__(self) -> str:
        period = "" if self.period is None else f"/{self.period}"
        part = f"[{self.part[0]}:{self.part[1]}{period}]" if self.part else ""
        return f"+ {self.bias}{part}" + (f" {self.output}" if self.output else "")

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors of the shift."""
        return (self.bias, *((self.output.weight, self.output.bias) if self.output else ()))

    def width(self, state: State) -> int:
        """Return the number of entries of the vector."""
        return int(self._view(state[self.bias]).numel())

    def check(self, state: State) -> None:
        """Check that the shift fits a model.

        Raises:
            SymmetryError: a tensor is missing or has another shape; the message names it.
        """
        missing = [name for name in self.tensors if name not in state]
        if missing:
            raise SymmetryError(f"{self}: the model has no tensor {missing[0]!r}; was it made for another model?")
        length, (start, stop) = state[self.bias].numel(), self.part or (0, state[self.bias].numel())
        if state[self.bias].dim() != 1 or length % (self.period or length) or not start < stop <= length:
            raise SymmetryError(
                f"{self}: {self.bias} has shape {tuple(state[self.bias].shape)}; give a vector that holds the part"
            )
        if self.output is not None:
            shape = (*state[self.output.bias].shape, self.width(state))
            if tuple(self.output.matrix(state).shape) != shape:
                raise SymmetryError(f"{self}: the projection should be {shape}, bias by values")

    def act(self, state: State, vector: Vector) -> dict[str, Tensor]:
        """Return the tensors that change when `vector` is added, by name."""
        bias = state[self.bias].clone()
        view = self._view(bias)
        view.add_(vector.to(bias).reshape(view.shape))
        if self.output is None:
            return {self.bias: bias}
        # In double, so that a round trip leaves only the rounding of the last cast.
        output = state[self.output.bias].double() - self.output.matrix(state) @ vector.to(bias.device)
        return {self.bias: bias, self.output.bias: output.to(state[self.output.bias].dtype)}

    def nearest(self, anchor: State, client: State) -> Vector:
        """Return the vector that brings the client's biases closest to the anchor's."""
        gap = self._vector(anchor) - self._vector(client)
        if self.output is None:
            return gap
        weight, bias = self.output.matrix(client), self.output.bias
        rhs = gap + weight.mT @ (client[bias].double() - anchor[bias].double())
        # The identity plus a Gram matrix is never singular, so the solution needs no fallback.
        eye = torch.eye(len(rhs), dtype=torch.float64, device=rhs.device)
        return torch.linalg.solve(eye + weight.mT @ weight, rhs)

    def _vector(self, state: State) -> Vector:
        return self._view(state[self.bias]).double().reshape(-1)

    def _view(self, bias: Tensor) -> Tensor:
        start, stop = self.part or (0, len(bias))
        return bias.unflatten(0, (-1, self.period or len(bias)))[:, start:stop]


Translation: TypeAlias = Mapping[Shift, Vector]
"""One vector for each shift; translations are a group under addition of their vectors."""


def translate(translation: Translation, state: State) -> dict[str, Tensor]:
    """Return the translated state, in which tensors that no shift touches are the same objects."""
    result = dict(state)
    for shift, vector in translation.items():
        result |= shift.act(result, vector)
    return result


def nearest(shifts: Iterable[Shift], anchor: State, client: State) -> Translation:
    """Return the translation that brings the client closest to the anchor."""
    return {shift: shift.nearest(anchor, client) for shift in shifts}


def random(shifts: Iterable[Shift], state: State, generator: torch.Generator) -> Translation:
    """Draw a translation whose vectors have the scale of the model's biases, or 1 where these are 0."""
    return {shift: _draw(shift, state, generator) for shift in shifts}


def _draw(shift: Shift, state: State, generator: torch.Generator) -> Vector:
    size = float(state[shift.bias].double().square().mean().sqrt()) or 1.0
    vector = torch.randn(shift.width(state), generator=generator, dtype=torch.float64)
    return size * vector.to(state[shift.bias].device)


_SHIFT = re.compile(
    r"\+ (?P<bias>[^\s\[\]]+)(?:\[(?P<start>\d+):(?P<stop>\d+)(?:/(?P<period>\d+))?\])?"
    r"(?: (?P<weight>[^\s\[\]]+)\[(?P<axis>[01])\] (?P<output>[^\s\[\]]+))?"
)


def parse_shift(line: str) -> Shift:
    """Parse a line of the notation as a shift.

    Raises:
        SymmetryError: the line is not in the notation.
    """
    match = _SHIFT.fullmatch(line)
    if match is None:
        raise SymmetryError(f"not a shift: {line!r}; write `+ key.bias` or `+ value.bias out.weight[1] out.bias`")
    part = (int(match["start"]), int(match["stop"])) if match["start"] else None
    output = Output(match["weight"], int(match["axis"]), match["output"]) if match["weight"] else None
    return Shift(match["bias"], part, int(match["period"]) if match["period"] else None, output)
