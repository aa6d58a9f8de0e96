"""Folding: a norm's gain moves into the layers that read it, so that nothing keeps the residual stream in place.

    W (gain * n(x) + bias) + b  =  (W diag(gain)) n(x) + (b + W bias)        n(x): the norm without gain and bias

A gain speaks of single entries of the stream; with all gains 1 the stream may be turned. The state keeps its names
and shapes and the model its function, but not its parametrisation: gains become 1, and gradients of the folded model
are others. Where a reader has no bias the norm keeps `bias / gain`, which turns with the stream as any vector
(SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024; Theus et al. 2025, arXiv 2506.22712).

A fold is written `norm -> reader.weight[axis] ...`, the axis being the one that meets the stream.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbasin.strategies.tensors.state import State, tied

# A bias divided by less would drown all else that turns with the stream.
_SMALLEST_GAIN = 1e-6


class FoldError(ValueError):
    """A norm that cannot be folded; the message names the tensor and the remedy."""


@dataclass(frozen=True)
class Reader:
    """A weight that meets a norm's output along `axis`."""

    tensor: str
    axis: int

    def __str__(self) -> str:
        return f"{self.tensor}[{self.axis}]"

    @property
    def bias(self) -> str:
        """The name that the layer's bias has if there is one."""
        return f"{self.tensor.removesuffix('weight')}bias"

    def along(self, weight: Tensor, vector: Tensor) -> Tensor:
        """The vector in a shape that multiplies the weight along the axis."""
        return vector.reshape(-1, *(1,) * (weight.dim() - 1 - self.axis))


@dataclass(frozen=True)
class Fold:
    """One norm and all layers that read it.

    Attributes:
        norm: the layer, whose tensors are `norm.weight` and perhaps `norm.bias`.
        readers: what reads its output; nothing else may.
    """

    norm: str
    readers: tuple[Reader, ...]

    def __str__(self) -> str:
        return " ".join([f"{self.norm} ->", *map(str, self.readers)])

    @property
    def gain(self) -> str:
        """The tensor that becomes 1."""
        return f"{self.norm}.weight"

    def check(self, state: State) -> None:
        """Check names and shapes, and that no reader is another tensor of the model too.

        Raises:
            FoldError: naming what is in the way.
        """
        shape = _shape(state, self.gain, self)
        if len(shape) != 1 or not self.readers:
            raise FoldError(f"{self}: give a norm with one gain per entry, and what reads it")
        for reader in self.readers:
            found = _shape(state, reader.tensor, self)
            if reader.axis >= len(found) or found[reader.axis] != shape[0]:
                raise FoldError(
                    f"{self}: {reader.tensor} has shape {found}, whose axis {reader.axis} does not meet "
                    f"the {shape[0]} entries of {self.gain}; name the axis that reads the norm"
                )
            _refuse_tied(state, reader, self)

    def apply(self, state: State) -> dict[str, Tensor]:
        """The tensors that folding changes; none where the gain is 1 and there is no bias to move."""
        weights = {r.tensor: _scaled(state[r.tensor], r, state[self.gain]) for r in self.readers}
        changed = {self.gain: torch.ones_like(state[self.gain]), **weights}
        shift = f"{self.norm}.bias"
        if shift not in state:
            return changed
        if all(reader.bias in state for reader in self.readers):
            moved = {r.bias: _shifted(state, r, state[shift]) for r in self.readers}
            return {**changed, **moved, shift: torch.zeros_like(state[shift])}
        return {**changed, shift: self._divided(state[shift], state[self.gain])}

    def _divided(self, bias: Tensor, gain: Tensor) -> Tensor:
        lost = (gain.abs() < _SMALLEST_GAIN) & (bias != 0)
        if bool(lost.any()):
            raise FoldError(
                f"{self.gain} is {float(gain[lost][0]):.2g} at entry {int(lost.nonzero()[0])}, where "
                f"{self.norm}.bias is not 0, and a reader has no bias to take it; give "
                f"{', '.join(r.tensor for r in self.readers)} a bias, or leave the stream to permutations"
            )
        return torch.where(bias == 0, bias, bias / gain)


def fold(folds: Iterable[Fold], state: State) -> dict[str, Tensor]:
    """The same function with every norm's gain 1. Folding twice changes nothing more.

    Raises:
        FoldError: a gain vanishes where the norm's bias could only be divided by it.
    """
    result = dict(state)
    for each in folds:
        result.update(each.apply(result))
    return result


def check_folds(folds: Iterable[Fold], state: State) -> None:
    """Check every fold against a model's tensors, and that no reader is folded into twice.

    Raises:
        FoldError: naming what is in the way.
    """
    taken: dict[str, str] = {}
    for each in folds:
        each.check(state)
        for reader in each.readers:
            other = taken.setdefault(reader.tensor, each.norm)
            if other != each.norm:
                raise FoldError(f"{reader.tensor} reads {other} and {each.norm}; only one can fold")


def _scaled(weight: Tensor, reader: Reader, gain: Tensor) -> Tensor:
    return weight * reader.along(weight, gain)


def _shifted(state: State, reader: Reader, shift: Tensor) -> Tensor:
    """The reader's bias with what the norm's own bias adds to the output."""
    weight, bias = state[reader.tensor], state[reader.bias]
    added = torch.tensordot(weight.movedim(reader.axis, -1), shift, dims=1)
    return bias + added.reshape(bias.shape)


def _shape(state: State, tensor: str, where: Fold) -> tuple[int, ...]:
    if tensor not in state:
        raise FoldError(
            f"{where}: the model has no tensor {tensor!r}; name the norm and what reads it"
        )
    return tuple(state[tensor].shape)


def _refuse_tied(state: State, reader: Reader, where: Fold) -> None:
    # Tensors without memory share none.
    first = tied({name: tensor for name, tensor in state.items() if not tensor.is_meta})
    own = first.get(reader.tensor)
    shared = [name for name, other in first.items() if other == own and name != reader.tensor]
    if own is not None and shared:
        raise FoldError(
            f"{where}: {reader.tensor} and {shared[0]} are one tensor, and the gain belongs to one of its "
            "uses alone; untie them (tie_word_embeddings = False), or leave the stream to permutations"
        )


_READER = re.compile(r"(?P<tensor>[^\s\[\]()]+)\[(?P<axis>\d+)\]")


def read_fold(line: str) -> Fold:
    """The fold that is written `line`.

    Raises:
        FoldError: it is not in the notation.
    """
    norm, _, readers = line.partition(" -> ")
    found = [_READER.fullmatch(word) for word in readers.split()]
    if not norm or " " in norm.strip() or not found or not all(found):
        raise FoldError(f"not a fold: {line!r}; write `norm -> reader.weight[1] ...`")
    return Fold(norm.strip(), tuple(Reader(m["tensor"], int(m["axis"])) for m in found if m))
