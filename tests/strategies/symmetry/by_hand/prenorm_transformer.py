"""The symmetry of pre-norm transformers (ViT, GPT) written in plain torch, from their names and shapes.

    x <- x + W_O concat_h softmax(q_h k_h^T / sqrt(d_h)) v_h,    x <- x + W_2 act(W_1 norm(x))

Permutations `S(d)` act on the residual stream, one for all layers that write or read it. Heads change places, and
inside a head queries and keys rotate together, and values against the output projection: `O(d_h)*O(d_h) wr S(h)`
(Zhang et al. 2025, arXiv 2502.00264). Permutations act on the hidden units of an MLP.

Without rotary positions a key bias adds the same number to all scores of a query and has no effect: it is transformed
with its head but does not count in matching, and any vector may be added to it. Transformers with rotary positions,
normalised queries and keys, or gated MLPs have other groups and need another family.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fedbasin.strategies.symmetry.groups.groups import Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError
from fedbasin.strategies.symmetry.translation import Output, Shift
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True)
class Names:
    """The names of a model's parts, in which `{block}` stands for the number of a block, from 0.

    Attributes:
        embedding: Linear or convolution that writes the residual stream, or None.
        tables: tensors whose last axis is the residual stream, such as token tables, positions and class tokens.
        attention_norm: LayerNorm before attention.
        query: Linear that writes queries.
        key: Linear that writes keys.
        value: Linear that writes values.
        output: Linear that reads the attended values.
        mlp_norm: LayerNorm before the MLP.
        up: first Linear of the MLP.
        down: second Linear of the MLP.
        final_norm: LayerNorm before the head.
        head: Linear that reads the final norm, or None.
    """

    embedding: str | None = "embedding"
    tables: tuple[str, ...] = ("positions",)
    attention_norm: str = "blocks.{block}.attention_norm"
    query: str = "blocks.{block}.attention.query"
    key: str = "blocks.{block}.attention.key"
    value: str = "blocks.{block}.attention.value"
    output: str = "blocks.{block}.attention.output"
    mlp_norm: str = "blocks.{block}.mlp_norm"
    up: str = "blocks.{block}.mlp.up"
    down: str = "blocks.{block}.mlp.down"
    final_norm: str = "final_norm"
    head: str | None = "head"


def preln_transformer(state: State, heads: int, names: Names | None = None, *, residual: bool = True) -> Symmetry:
    """Return the symmetry of a transformer: the residual stream, then heads and MLP units block by block.

    Args:
        state: tensors of the model; only names and shapes are read. Biases are optional.
        heads: number of attention heads of a block.
        names: names of the model's parts.
        residual: False leaves the residual stream as it is.

    Raises:
        SymmetryError: a tensor is missing or has another shape than its part should have.
    """
    return _Family(state, heads, names or Names()).symmetry(residual=residual)


@dataclass(frozen=True)
class _Family:
    state: State
    heads: int
    names: Names

    def symmetry(self, *, residual: bool) -> Symmetry:
        blocks = range(self._count())
        stream = self._residual(blocks)
        inner = [space for block in blocks for space in (self._heads(block), self._hidden(block))]
        shifts = tuple(shift for block in blocks for shift in self._shifts(block))
        return Symmetry((stream, *inner) if residual else tuple(inner), shifts=shifts)

    def _count(self) -> int:
        # Counted in the state, because plain models have no config.
        block = 0
        while f"{self.names.query.format(block=block)}.weight" in self.state:
            block += 1
            if "{block}" not in self.names.query:
                return block
        # Without any block, the lookup of block 0 names the missing tensor.
        return max(block, 1)

    def _residual(self, blocks: range) -> Space:
        width = self._length(f"{self.names.query.format(block=0)}.weight", 1)
        axes = tuple(self._stream(blocks, width))
        return Space("residual", Permutation(width), axes)

    def _stream(self, blocks: range, width: int) -> Iterator[Axis]:
        names = self.names
        if names.embedding is not None:
            yield from self._writer(names.embedding, width)
        for table in names.tables:
            yield self._axis(table, len(self._shape(table)) - 1, width)
        for block in blocks:
            yield from self._writer(names.attention_norm.format(block=block), width)
            for reader in (names.query, names.key, names.value):
                yield self._axis(f"{reader.format(block=block)}.weight", 1, width)
            yield from self._writer(names.output.format(block=block), width)
            yield from self._writer(names.mlp_norm.format(block=block), width)
            yield self._axis(f"{names.up.format(block=block)}.weight", 1, width)
            yield from self._writer(names.down.format(block=block), width)
        yield from self._writer(names.final_norm, width)
        if names.head is not None:
            yield self._axis(f"{names.head}.weight", 1, width)

    def _heads(self, block: int) -> Space:
        query, key, value, output = (
            name.format(block=block) for name in (self.names.query, self.names.key, self.names.value, self.names.output)
        )
        scores = self._length(f"{query}.weight", 0)
        values = self._length(f"{value}.weight", 0)
        axes = (
            *self._writer(query, scores),
            self._axis(f"{key}.weight", 0, scores),
            *self._bias(key, scores, scored=False),
            *self._writer(value, values, role=1),
            self._axis(f"{output}.weight", 1, values, role=1),
        )
        inners = (self._rotation(query, scores), self._rotation(value, values))
        return Space(f"heads.{block}", Wreath(inners, self.heads), axes)

    def _shifts(self, block: int) -> Iterator[Shift]:
        key, value, output = (
            name.format(block=block) for name in (self.names.key, self.names.value, self.names.output)
        )
        if f"{key}.bias" in self.state:
            yield Shift(f"{key}.bias")
        if f"{value}.bias" in self.state and f"{output}.bias" in self.state:
            projection = Output(f"{output}.weight", 1, f"{output}.bias")
            yield Shift(f"{value}.bias", output=projection)

    def _rotation(self, projection: str, width: int) -> Orthogonal:
        if self.heads < 1 or width % self.heads:
            raise SymmetryError(
                f"{projection}.weight writes {width} features, which {self.heads} heads cannot share; "
                f"give the model's number of heads"
            )
        return Orthogonal(width // self.heads)

    def _hidden(self, block: int) -> Space:
        up, down = self.names.up.format(block=block), self.names.down.format(block=block)
        width = self._length(f"{up}.weight", 0)
        axes = (*self._writer(up, width), self._axis(f"{down}.weight", 1, width))
        return Space(f"mlp.{block}", Permutation(width), axes)

    def _writer(self, name: str, width: int, role: int = 0) -> Iterator[Axis]:
        """Yield the axes of weight and bias of a layer whose first axis is the space, such as a norm."""
        yield self._axis(f"{name}.weight", 0, width, role)
        yield from self._bias(name, width, role)

    def _bias(self, name: str, width: int, role: int = 0, *, scored: bool = True) -> Iterator[Axis]:
        if f"{name}.bias" in self.state:
            yield self._axis(f"{name}.bias", 0, width, role, scored=scored)

    def _axis(self, tensor: str, axis: int, width: int, role: int = 0, *, scored: bool = True) -> Axis:
        if self._length(tensor, axis) != width:
            raise SymmetryError(
                f"{tensor} has shape {self._shape(tensor)}, but axis {axis} should have {width} entries; "
                f"give a model with separate query, key, value and output projections of one width"
            )
        return Axis(tensor, axis, role=role, scored=scored)

    def _length(self, tensor: str, axis: int) -> int:
        shape = self._shape(tensor)
        if axis >= len(shape):
            raise SymmetryError(f"{tensor} has shape {shape} and no axis {axis}")
        return shape[axis]

    def _shape(self, tensor: str) -> tuple[int, ...]:
        if tensor not in self.state:
            raise SymmetryError(f"the model has no tensor {tensor!r}; give its name in Names")
        return tuple(self.state[tensor].shape)
