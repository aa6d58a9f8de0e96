"""Accumulators of the Gram matrix of a layer's inputs: the whole matrix, or a sketch of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.proto.encoding import Encoding, GramForm, GramKind
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.compression.formats import Pieces, decode, encode, raise_diagonal
from fedbasin.strategies.fusion.compression.sketch import Sketch
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.statistics.finite import check_statistic

Result = TypeVar("Result")


class GramAccumulator(Protocol):
    """A sum over the rows of a layer's inputs."""

    def add(self, rows: Float[Tensor, "groups part in"]) -> None:
        """Add rows, in double."""
        ...

    @property
    def gram(self) -> Float[Tensor, "*groups inputs inputs"]:
        """The Gram matrix, as far as the accumulator keeps it."""
        ...

    def pieces(self, shrink: float) -> Pieces:
        """Return the pieces to send where the matrix weighs the client's weights.

        Args:
            shrink: factor on the off-diagonal, RegMean's alpha.
        """
        ...

    def dominating_pieces(self) -> Pieces:
        """Return the pieces to send where a residual is divided by the matrix.

        They decode to a matrix that is not below the exact one, so that no step is too long.
        """
        ...


@dataclass(frozen=True, eq=False)
class FullGram:
    """An accumulator of the whole matrix, in double.

    Products in float64 are about three times slower than in float32 on a CPU. They are exact for float32 inputs and
    only their sum rounds, so neither the batch size nor the split of the data over clients shows in the result, and a
    nearly singular Gram matrix stays positive.
    """

    gram: Float[Tensor, "*groups inputs inputs"]
    form: GramForm
    bias: bool

    def add(self, rows: Float[Tensor, "groups part in"]) -> None:
        grouped = self.gram.view(-1, *self.gram.shape[-2:])
        grouped.baddbmm_(rows.mT, rows)

    def pieces(self, shrink: float) -> Pieces:
        return encode(shrink_off_diagonal(self.gram, shrink).cpu(), self.form, self.bias)

    def dominating_pieces(self) -> Pieces:
        gram = raise_diagonal(shrink_off_diagonal(self.gram, 1.0).cpu(), self.form, self.bias)
        return encode(gram, self.form, self.bias)


@dataclass(frozen=True, eq=False)
class SketchedGram:
    """An accumulator of one sketch for each group, which never makes the square matrix."""

    sketches: list[Sketch]
    form: GramForm
    groups: tuple[int, ...]

    def add(self, rows: Float[Tensor, "groups part in"]) -> None:
        for sketch, part in zip(self.sketches, rows, strict=True):
            sketch.add(part)

    @property
    def gram(self) -> Float[Tensor, "*groups inputs inputs"]:
        return decode(self._pieces(above=False), self.form, self.sketches[0].bias)

    def pieces(self, shrink: float) -> Pieces:
        if shrink < 1:
            raise ValueError(
                f"shrink = {shrink}: a sketch has no off-diagonal to shrink; request another form, or shrink = 1"
            )
        return self._pieces(above=False)

    def dominating_pieces(self) -> Pieces:
        return self._pieces(above=True)

    def _pieces(self, *, above: bool) -> Pieces:
        groups = [sketch.finish(above=above) for sketch in self.sketches]
        if not self.groups:
            return groups[0]
        return {name: torch.stack([pieces[name] for pieces in groups]) for name in groups[0]}


def zero_accumulator(layer: Layer, encoding: Encoding, device: torch.device) -> GramAccumulator:
    """Return an accumulator without rows, of the kind that the encoding needs."""
    groups = (layer.groups,) if layer.groups > 1 else ()
    bias = len(layer.block) > 1
    size = layer.inputs
    if encoding.gram.kind is GramKind.sketch:
        sketches = [Sketch.zero(encoding.gram.size, size, bias) for _ in range(layer.groups)]
        return SketchedGram(sketches, encoding.gram, groups)
    zeros = torch.zeros(*groups, size, size, dtype=torch.float64, device=device)
    return FullGram(zeros, encoding.gram, bias)


def finish_shared(
    accumulators: Mapping[Block, GramAccumulator], finish: Callable[[GramAccumulator], Result]
) -> dict[Block, Result]:
    """Apply a function once to each accumulator; layers that share an accumulator share the result, as one object.

    Raises:
        Refusal: a Gram matrix is not finite.
    """
    for block, accumulator in accumulators.items():
        # The square of a sketch is never made; its pieces show what is not finite.
        if isinstance(accumulator, FullGram):
            check_statistic(block, accumulator.gram)
    unique = {id(accumulator): accumulator for accumulator in accumulators.values()}
    results = {key: finish(accumulator) for key, accumulator in unique.items()}
    return {block: results[id(accumulator)] for block, accumulator in accumulators.items()}


def shrink_off_diagonal(gram: Tensor, shrink: float) -> Tensor:
    """Return the Gram matrix with its off-diagonal entries multiplied by a factor, RegMean's alpha."""
    # Matrix products round the two triangles differently.
    symmetric = (gram + gram.mT) / 2
    return torch.lerp(torch.diag_embed(symmetric.diagonal(dim1=-2, dim2=-1)), symmetric, shrink)
