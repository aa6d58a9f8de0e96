"""What is kept of a layer's inputs while they are read: their Gram matrix, or a sketch of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.proto.encoding import Encoding, GramForm, GramKind
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.compression.formats import Pieces, decode, dominating, encode
from fedbasin.strategies.fusion.compression.sketch import Sketch
from fedbasin.strategies.fusion.layers import Layer

Made = TypeVar("Made")


class Total(Protocol):
    """The sum over the rows so far."""

    def add(self, rows: Float[Tensor, "groups part in"]) -> None:
        """Read rows, in double."""
        ...

    @property
    def gram(self) -> Float[Tensor, "*groups inputs inputs"]:
        """The Gram matrix as far as it is known."""
        ...

    def weighing(self, shrink: float) -> Pieces:
        """What is sent where weights are weighed by it; `shrink` is a factor on the off-diagonal."""
        ...

    def dividing(self) -> Pieces:
        """What is sent where what is left to explain is divided by it, so that no step is too long."""
        ...


@dataclass(frozen=True, eq=False)
class Square:
    """The whole matrix, in double.

    Products in float64 are about three times slower than in float32 on a CPU. They are exact for float32 inputs
    and only their sum rounds, so neither the batch size nor the split of the data over clients shows in the
    result, and a nearly singular Gram stays positive.
    """

    gram: Float[Tensor, "*groups inputs inputs"]
    form: GramForm
    bias: bool

    def add(self, rows: Float[Tensor, "groups part in"]) -> None:
        grouped = self.gram.view(-1, *self.gram.shape[-2:])
        grouped.baddbmm_(rows.mT, rows)

    def weighing(self, shrink: float) -> Pieces:
        return encode(shrunk(self.gram, shrink).cpu(), self.form, self.bias)

    def dividing(self) -> Pieces:
        gram = dominating(shrunk(self.gram, 1.0).cpu(), self.form, self.bias)
        return encode(gram, self.form, self.bias)


@dataclass(frozen=True, eq=False)
class Sketched:
    """A sketch for each group, so that the square is never made."""

    sketches: list[Sketch]
    form: GramForm
    groups: tuple[int, ...]

    def add(self, rows: Float[Tensor, "groups part in"]) -> None:
        for sketch, part in zip(self.sketches, rows, strict=True):
            sketch.add(part)

    @property
    def gram(self) -> Float[Tensor, "*groups inputs inputs"]:
        return decode(self._pieces(above=False), self.form, self.sketches[0].bias)

    def weighing(self, shrink: float) -> Pieces:
        if shrink < 1:
            raise ValueError(
                f"shrink = {shrink}: a sketch has no off-diagonal; ask for another form"
            )
        return self._pieces(above=False)

    def dividing(self) -> Pieces:
        return self._pieces(above=True)

    def _pieces(self, *, above: bool) -> Pieces:
        each = [sketch.finished(above=above) for sketch in self.sketches]
        if not self.groups:
            return each[0]
        return {name: torch.stack([pieces[name] for pieces in each]) for name in each[0]}


def nothing(layer: Layer, encoding: Encoding, device: torch.device) -> Total:
    """The total of no rows, of the kind that the encoding needs."""
    groups = (layer.groups,) if layer.groups > 1 else ()
    bias = len(layer.block) > 1
    if encoding.gram.kind is GramKind.sketch:
        size = encoding.gram.size
        sketches = [Sketch.zero(size, layer.inputs, bias) for _ in range(layer.groups)]
        return Sketched(sketches, encoding.gram, groups)
    size = layer.inputs
    zeros = torch.zeros(*groups, size, size, dtype=torch.float64, device=device)
    return Square(zeros, encoding.gram, bias)


def finished(totals: Mapping[Block, Total], finish: Callable[[Total], Made]) -> dict[Block, Made]:
    """What each total comes to; layers that have one in common have that in common too, one object."""
    made = {id(total): total for total in totals.values()}
    results = {key: finish(total) for key, total in made.items()}
    return {block: results[id(total)] for block, total in totals.items()}


def shrunk(gram: Tensor, shrink: float) -> Tensor:
    """The Gram matrix with its off-diagonal times a factor, RegMean's alpha."""
    symmetric = (gram + gram.mT) / 2  # matrix products round the two triangles differently
    return torch.lerp(torch.diag_embed(symmetric.diagonal(dim1=-2, dim2=-1)), symmetric, shrink)
