"""Which layers have read the same tensors, so that one total serves them all: queries, keys and values; gate and up.

Before the first batch all layers of one size have one total, that of no rows. They part where one reads what another
does not, while the model runs: each goes on from what they have both read. So totals are exact for every model, and
no batch is looked at twice.
"""

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count
from weakref import ReferenceType, ref

from torch import Tensor, nn

from fedbasin.client.capture.layer_calls import Product
from fedbasin.client.statistics.gram_accumulators import Total, nothing
from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.fusion.update import stored


class Inputs:
    """Numbers for what one forward pass reads: one number for one tensor, read with one kernel."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[ReferenceType[Tensor], int]] = {}
        self._numbers = count()

    def number(self, product: Product) -> int:
        """Of what a product has just read; another one after somebody has written into it."""
        inputs = product.inputs
        if inputs.is_inference():  # nobody counts what is written into it
            return next(self._numbers)
        key = id(inputs), inputs._version, product.kernel
        known = self._known.get(key)
        # An address may be another tensor's by now.
        if known is None or known[0]() is not inputs:
            known = self._known[key] = ref(inputs), next(self._numbers)
        return known[1]


@dataclass(eq=False)
class _Group:
    """Layers that have read the same tensors.

    Attributes:
        total: of their rows.
        members: the layers.
        latest: the number of the tensor that was read last.
        waiting: the members that have not read it.
        before: the total without it, as long as there are such members.
    """

    total: Total
    members: set[Block] = field(default_factory=set)
    latest: int | None = None
    waiting: set[Block] = field(default_factory=set)
    before: Total | None = None


class Shared:
    """The totals of some layers' inputs; those that have read the same tensors have one, the same object."""

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], encodings: Mapping[Block, Encoding]
    ) -> None:
        """Begin with no rows.

        Args:
            model: that is read.
            layers: of it.
            encodings: how they are sent; those that differ have nothing in common.
        """
        self._groups: dict[Block, _Group] = {}
        alike: dict[Hashable, _Group] = {}
        for layer in layers:
            block, encoding = layer.block, encodings.get(layer.block, Encoding())
            device = model.get_parameter(stored(block)[0]).device
            # A grouped convolution has several matrices, each for its own part of the outputs.
            alone = block if layer.groups > 1 else None
            key = layer.inputs, len(block), encoding.gram, device, alone
            if key not in alike:
                alike[key] = _Group(nothing(layer, encoding, device))
            self._groups[block] = alike[key]
            alike[key].members.add(block)

    @property
    def totals(self) -> dict[Block, Total]:
        """What each layer has read."""
        return {block: group.total for block, group in self._groups.items()}

    def read(self, block: Block, number: int) -> Total | None:
        """What a layer's rows are to be added to, at once; None if they have been, for another layer.

        Args:
            block: the layer.
            number: of what it reads in this forward pass.
        """
        group = self._groups[block]
        if number == group.latest and block in group.waiting:
            group.waiting.remove(block)
            group.before = group.before if group.waiting else None
            return None
        self._part(group)
        group = self._groups[block]
        group.latest, group.waiting = number, group.members - {block}
        group.before = deepcopy(group.total) if group.waiting else None
        return group.total

    def end(self) -> None:
        """End a forward pass: layers that still wait have not read what the others have."""
        for group in set(self._groups.values()):
            self._part(group)

    def _part(self, group: _Group) -> None:
        """Let those that wait go on by themselves."""
        if group.before is None:
            return
        rest = _Group(group.before, group.waiting)
        self._groups |= dict.fromkeys(rest.members, rest)
        group.members = group.members - rest.members
        group.waiting, group.before = set(), None
