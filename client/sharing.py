"""Which layers read the same rows, so that one Gram matrix serves them all: queries, keys and values; gate and up.

It is read off the first batch, and held to in every later one: a sum over the inputs of the first of such layers,
their leader, is the others' too.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import chain
from weakref import ReferenceType, ref

from torch import Tensor, nn

from fedbasin.client.data import Batch, forward
from fedbasin.client.products import Product, Products
from fedbasin.client.totals import Total, nothing
from fedbasin.strategies.fusion.compact import Encoding
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.fusion.update import Block


class FlowError(ValueError):
    """A model whose course depends on its weights or its inputs, so that its layers cannot be compared."""


class Readers:
    """The layers of one forward pass, by what they read. See them while it runs.

    Attributes:
        examples: in the batch.
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self._first: dict[Hashable, tuple[ReferenceType[Tensor], Block]] = {}
        self._leaders: dict[Block, Block] = {}
        self._calls: Counter[Block] = Counter()

    def see(self, product: Product) -> None:
        """Take note of a product, as soon as it is computed."""
        block = product.layer.block
        self._calls[block] += 1
        self._leaders[block] = self._leader(product) if self._is_plain(product) else block

    def leaders(self) -> dict[Block, Block]:
        """For each layer that was called, the first that read the same; itself where one was called twice."""
        return {
            block: leader if self._calls[block] == self._calls[leader] == 1 else block
            for block, leader in self._leaders.items()
        }

    def _leader(self, product: Product) -> Block:
        """The first reader of the same tensor, if nobody has written into it since."""
        inputs, layer = product.inputs, product.layer
        key = id(inputs), inputs._version, product.kernel, layer.inputs
        first = self._first.get(key)
        # An address may be another tensor's by now.
        if first is None or first[0]() is not inputs:
            first = self._first[key] = ref(inputs), layer.block
        return first[1]

    def _is_plain(self, product: Product) -> bool:
        """Whether the rows are those of every example: those that a router picks are others on each client."""
        inputs = product.inputs
        whole = inputs.dim() > 2 and len(inputs) == self.examples
        return whole and product.layer.groups == 1 and not inputs.is_inference()


def find_leaders(
    model: nn.Module,
    layers: Sequence[Layer],
    encodings: Mapping[Block, Encoding],
    batches: Iterator[Batch],
) -> tuple[dict[Block, Block], Iterator[Batch]]:
    """For each layer the one whose Gram matrix is its own too, itself where that is nobody else's; and all batches.

    Args:
        model: in evaluation mode.
        layers: those that are looked at.
        encodings: how they are sent; those that differ have nothing in common.
        batches: the first is looked at beforehand.
    """
    alone = {layer.block: layer.block for layer in layers}
    if len(layers) < 2:
        return alone, batches
    first = next(batches)
    readers = Readers(len(first.targets))
    with Products(model, layers, readers.see):
        forward(model, first)
    found = alone | readers.leaders()
    alike = {
        block: (leader, encodings.get(block, Encoding()).gram) for block, leader in found.items()
    }
    leaders = {key: block for block, key in reversed(alike.items())}
    return {block: leaders[key] for block, key in alike.items()}, chain([first], batches)


def led_totals(
    model: nn.Module,
    layers: Sequence[Layer],
    leaders: Mapping[Block, Block],
    encodings: Mapping[Block, Encoding],
) -> dict[Block, Total]:
    """For each layer the total of no rows of its leader, the same object."""
    totals = {
        layer.block: nothing(
            layer,
            encodings.get(layer.block, Encoding()),
            model.get_parameter(layer.block[0]).device,
        )
        for layer in layers
        if leaders[layer.block] == layer.block
    }
    return {block: totals[leader] for block, leader in leaders.items()}


def check_leaders(leaders: Mapping[Block, Block], readers: Readers) -> None:
    """Check that what was found of the first batch holds in a later one.

    Raises:
        FlowError: it does not.
    """
    now = readers.leaders()
    for block, leader in leaders.items():
        if now.get(block) != now.get(leader):
            raise FlowError(
                f"{block[0]} and {leader[0]} read the same tensor in the first batch and not in a later one; a model "
                "whose course depends on its inputs needs the recipe fedavg or fisher"
            )
