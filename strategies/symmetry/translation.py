"""Translations: biases of attention that may be moved by any constant, because softmax does not see it.

    softmax_j(q_i . (k_j + c)) = softmax_j(q_i . k_j)                             b_K -> b_K + c
    sum_j p_ij (v_j + c) = sum_j p_ij v_j + c        as sum_j p_ij = 1           b_V -> b_V + c,  b_O -> b_O - W_O c

The first holds where nothing comes between key and score: neither rotary positions, nor a norm of keys, nor positions
that read keys. The second holds wherever the weights of attention sum to one: no sinks, no keys of zeros. Both are
groups of vectors under addition, and what brings a client closest to the anchor is a linear solve,

    c = (I + W_O^T W_O)^-1 ((b_V^a - b_V) + W_O^T (b_O - b_O^a))

and `b_K^a - b_K` for keys. A shift is written `+ key.bias` or `+ value.bias output.weight[axis] output.bias`, the axis
being the one that reads, with `[start:stop]` or `[start:stop/period]` after a bias that holds others too.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.tensors.state import State

Vector = Float[Tensor, " width"]


class ShiftError(ValueError):
    """A text that is no shift, or one that does not fit the tensors that it names."""


@dataclass(frozen=True)
class Output:
    """What takes up a shift of values: the projection that reads them and its bias."""

    weight: str
    axis: int
    bias: str

    def __str__(self) -> str:
        return f"{self.weight}[{self.axis}] {self.bias}"

    def matrix(self, state: State) -> Float[Tensor, "out width"]:
        """The projection in double precision, `[out, in]`."""
        weight = state[self.weight].double()
        return weight if self.axis == 1 else weight.mT


@dataclass(frozen=True)
class Shift:
    """One bias, or a part of it, that any vector may be added to.

    Attributes:
        bias: name of the tensor.
        part: start and stop of its entries, or None for all of them.
        period: the part is that of every run of so many entries.
        output: what takes the vector up; None where nothing sees it.
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
        """All tensors that are named."""
        return (self.bias, *((self.output.weight, self.output.bias) if self.output else ()))

    def width(self, state: State) -> int:
        """How many entries the vector has."""
        return int(self._view(state[self.bias]).numel())

    def check(self, state: State) -> None:
        """Check that names and shapes fit.

        Raises:
            ShiftError: naming what does not.
        """
        missing = [name for name in self.tensors if name not in state]
        if missing:
            raise ShiftError(f"{self}: the model has no tensor {missing[0]!r}")
        length, (start, stop) = state[self.bias].numel(), self.part or (0, state[self.bias].numel())
        if (
            state[self.bias].dim() != 1
            or length % (self.period or length)
            or not start < stop <= length
        ):
            raise ShiftError(f"{self}: {self.bias} has shape {tuple(state[self.bias].shape)}")
        if self.output is not None:
            shape = (*state[self.output.bias].shape, self.width(state))
            if tuple(self.output.matrix(state).shape) != shape:
                raise ShiftError(f"{self}: the projection should be {shape}, bias by values")

    def act(self, state: State, vector: Vector) -> dict[str, Tensor]:
        """The tensors that change when `vector` is added."""
        bias = state[self.bias].clone()
        view = self._view(bias)
        view.add_(vector.to(bias).reshape(view.shape))
        if self.output is None:
            return {self.bias: bias}
        output = state[self.output.bias].double() - self.output.matrix(state) @ vector.to(
            bias.device
        )
        return {self.bias: bias, self.output.bias: output.to(state[self.output.bias].dtype)}

    def nearest(self, anchor: State, client: State) -> Vector:
        """What to add to the client's bias to come closest to the anchor."""
        gap = self._vector(anchor) - self._vector(client)
        if self.output is None:
            return gap
        weight, bias = self.output.matrix(client), self.output.bias
        wanted = gap + weight.mT @ (client[bias].double() - anchor[bias].double())
        eye = torch.eye(len(wanted), dtype=torch.float64, device=wanted.device)
        return torch.linalg.solve(eye + weight.mT @ weight, wanted)

    def _vector(self, state: State) -> Vector:
        return self._view(state[self.bias]).double().reshape(-1)

    def _view(self, bias: Tensor) -> Tensor:
        start, stop = self.part or (0, len(bias))
        return bias.unflatten(0, (-1, self.period or len(bias)))[:, start:stop]


@dataclass(frozen=True, eq=False)
class Translation:
    """A vector for each shift.

    Laws: `t.inverse().act(t.act(s)) == s`, `t.after(u).act(s) == t.act(u.act(s))`, and `act` keeps the model's
    function.
    """

    vectors: Mapping[Shift, Vector]

    def act(self, state: State) -> dict[str, Tensor]:
        """The translated state; tensors that no shift touches are the same objects."""
        result = dict(state)
        for shift, vector in self.vectors.items():
            result |= shift.act(result, vector)
        return result

    def inverse(self) -> "Translation":
        """The translation that undoes this one."""
        return Translation({shift: -vector for shift, vector in self.vectors.items()})

    def after(self, first: "Translation") -> "Translation":
        """The sum: translations add up, in any order."""
        total = dict(first.vectors)
        for shift, vector in self.vectors.items():
            total[shift] = total[shift] + vector if shift in total else vector
        return Translation(total)


def nearest(shifts: Iterable[Shift], anchor: State, client: State) -> Translation:
    """The translation that takes the client closest to the anchor."""
    return Translation({shift: shift.nearest(anchor, client) for shift in shifts})


def random(shifts: Iterable[Shift], state: State, generator: torch.Generator) -> Translation:
    """A drawn translation, for checks and planted problems; vectors have the size of the model's biases, or 1."""
    return Translation({shift: _drawn(shift, state, generator) for shift in shifts})


def _drawn(shift: Shift, state: State, generator: torch.Generator) -> Vector:
    size = float(state[shift.bias].double().square().mean().sqrt()) or 1.0
    drawn = torch.randn(shift.width(state), generator=generator, dtype=torch.float64)
    return size * drawn.to(state[shift.bias].device)


_SHIFT = re.compile(
    r"\+ (?P<bias>[^\s\[\]]+)(?:\[(?P<start>\d+):(?P<stop>\d+)(?:/(?P<period>\d+))?\])?"
    r"(?: (?P<weight>[^\s\[\]]+)\[(?P<axis>[01])\] (?P<output>[^\s\[\]]+))?"
)


def read_shift(line: str) -> Shift:
    """The shift that is written `line`.

    Raises:
        ShiftError: it is none.
    """
    match = _SHIFT.fullmatch(line)
    if match is None:
        raise ShiftError(
            f"not a shift: {line!r}; write `+ key.bias` or `+ value.bias out.weight[1] out.bias`"
        )
    part = (int(match["start"]), int(match["stop"])) if match["start"] else None
    output = (
        Output(match["weight"], int(match["axis"]), match["output"]) if match["weight"] else None
    )
    return Shift(match["bias"], part, int(match["period"]) if match["period"] else None, output)
