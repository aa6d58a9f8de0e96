"""Folding: the weight and bias of a norm move into the layers that read it, so that the residual stream can rotate.

    W (w * n(x) + b) + c  =  (W diag(w)) n(x) + (c + W b)        n(x): the norm without weight w and bias b

The weight of a norm belongs to single entries of the residual stream, so it would forbid rotations. Once all weights
are 1 the stream can rotate. The state keeps its names and shapes, and the model its function, but not its
parametrisation: weights of norms become 1, and gradients of the folded model differ. Where a reader has no bias the
norm keeps `b / w`, which rotates with the stream as any vector does (SliceGPT, Ashkboos et al. 2024, arXiv
2401.15024; Theus et al. 2025, arXiv 2506.22712).

A fold is written `norm -> reader.weight[axis] ...`, where the axis is the one that reads the stream.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbasin.strategies.symmetry.symmetry_error import SymmetryError
from fedbasin.strategies.tensors.state import State, tied

# A bias divided by a smaller weight would exceed everything else on the stream by orders of magnitude.
_SMALLEST_WEIGHT = 1e-6


@dataclass(frozen=True)
class Reader:
    """The weight of a layer that reads the output of a norm along `axis`."""

    tensor: str
    axis: int

    def __str__(self) -> str:
        return f"{self.tensor}[{self.axis}]"

    @property
    def bias(self) -> str:
        """The name of the layer's bias, which may not exist."""
        return f"{self.tensor.removesuffix('weight')}bias"

    def along(self, weight: Tensor, vector: Tensor) -> Tensor:
        """Return the vector in a shape that multiplies the weight along the axis."""
        return vector.reshape(-1, *(1,) * (weight.dim() - 1 - self.axis))


@dataclass(frozen=True)
class Fold:
    """A norm and all layers that read it.

    Attributes:
        norm: name of the norm, whose tensors are `norm.weight` and perhaps `norm.bias`.
        readers: the layers that read its output; no other layer may read it.
    """

    norm: str
    readers: tuple[Reader, ...]

    def __str__(self) -> str:
        return " ".join([f"{self.norm} ->", *map(str, self.readers)])

    @property
    def weight(self) -> str:
        """The name of the norm's weight, which becomes 1."""
        return f"{self.norm}.weight"

    def check(self, state: State) -> None:
        """Check that the fold fits a model.

        Raises:
            SymmetryError: a tensor is missing or has another shape, nothing reads the norm, or a reader is tied.
        """
        shape = _shape(state, self.weight, self)
        if len(shape) != 1:
            raise SymmetryError(f"{self}: give a norm with one weight per entry")
        if not self.readers:
            raise SymmetryError(
                f"{self.norm} has no reader in the model to fold into; a head that is tied to the token table cannot "
                "be one: untie it (tie_word_embeddings = False)"
            )
        for reader in self.readers:
            read_shape = _shape(state, reader.tensor, self)
            if reader.axis >= len(read_shape) or read_shape[reader.axis] != shape[0]:
                raise SymmetryError(
                    f"{self}: {reader.tensor} has shape {read_shape}, whose axis {reader.axis} does not meet "
                    f"the {shape[0]} entries of {self.weight}; name the axis that reads the norm"
                )
            _refuse_tied(state, reader, self)

    def apply(self, state: State) -> dict[str, Tensor]:
        """Return the tensors that folding changes, by name."""
        weight = state[self.weight]
        changed = {r.tensor: state[r.tensor] * r.along(state[r.tensor], weight) for r in self.readers}
        changed[self.weight] = torch.ones_like(weight)
        bias = f"{self.norm}.bias"
        if bias not in state:
            return changed
        # The bias moves only if every reader can absorb it: part of it left behind would count twice.
        if all(reader.bias in state for reader in self.readers):
            biases = {r.bias: _absorb(state, r, state[bias]) for r in self.readers}
            return {**changed, **biases, bias: torch.zeros_like(state[bias])}
        return {**changed, bias: self._divide(state[bias], weight)}

    def _divide(self, bias: Tensor, weight: Tensor) -> Tensor:
        lost = (weight.abs() < _SMALLEST_WEIGHT) & (bias != 0)
        if bool(lost.any()):
            raise SymmetryError(
                f"{self.weight} is {float(weight[lost][0]):.2g} at entry {int(lost.nonzero()[0])}, where "
                f"{self.norm}.bias is not 0, and a reader has no bias to absorb it; give "
                f"{', '.join(r.tensor for r in self.readers)} a bias, or leave the stream to permutations"
            )
        # Entries without a bias stay 0 even if the weight is 0 too, where the quotient would be NaN.
        return torch.where(bias == 0, bias, bias / weight)


def fold(folds: Iterable[Fold], state: State) -> dict[str, Tensor]:
    """Return a state with the same function in which the weight of every folded norm is 1; folding is idempotent.

    Raises:
        SymmetryError: a bias would have to be divided by a weight that is almost 0.
    """
    result = dict(state)
    for step in folds:
        result.update(step.apply(result))
    return result


def check_folds(folds: Iterable[Fold], state: State) -> None:
    """Check every fold against the tensors of a model, and that every reader reads one norm.

    Raises:
        SymmetryError: a fold does not fit, or a reader reads two norms.
    """
    norms: dict[str, str] = {}
    for step in folds:
        step.check(state)
        for reader in step.readers:
            norm = norms.setdefault(reader.tensor, step.norm)
            if norm != step.norm:
                raise SymmetryError(
                    f"{reader.tensor} reads {norm} and {step.norm}, but only one norm can be folded into a "
                    "layer; leave one of the two out"
                )


def _absorb(state: State, reader: Reader, norm_bias: Tensor) -> Tensor:
    """Return the reader's bias plus the contribution of the norm's bias to its output."""
    weight, bias = state[reader.tensor], state[reader.bias]
    contribution = torch.tensordot(weight.movedim(reader.axis, -1), norm_bias, dims=1)
    return bias + contribution.reshape(bias.shape)


def _shape(state: State, tensor: str, where: Fold) -> tuple[int, ...]:
    if tensor not in state:
        raise SymmetryError(f"{where}: the model has no tensor {tensor!r}; name the norm and the layers that read it")
    return tuple(state[tensor].shape)


def _refuse_tied(state: State, reader: Reader, where: Fold) -> None:
    # Meta tensors have no memory and would all seem to share the same.
    names = tied({name: tensor for name, tensor in state.items() if not tensor.is_meta})
    name = names.get(reader.tensor)
    twins = [n for n, original in names.items() if original == name and n != reader.tensor]
    if name is not None and twins:
        raise SymmetryError(
            f"{where}: {reader.tensor} and {twins[0]} are one tensor, and the norm's weight belongs to one of its "
            "uses alone; untie them (tie_word_embeddings = False), or leave the stream to permutations"
        )


_READER = re.compile(r"(?P<tensor>[^\s\[\]()]+)\[(?P<axis>\d+)\]")


def parse_fold(line: str) -> Fold:
    """Parse a line of the notation as a fold.

    Raises:
        SymmetryError: the line is not in the notation.
    """
    norm, _, readers = line.partition(" -> ")
    matches = [_READER.fullmatch(word) for word in readers.split()]
    if not norm or " " in norm.strip() or not matches or not all(matches):
        raise SymmetryError(f"not a fold: {line!r}; write `norm -> reader.weight[1] ...`")
    return Fold(norm.strip(), tuple(Reader(m["tensor"], int(m["axis"])) for m in matches if m))
