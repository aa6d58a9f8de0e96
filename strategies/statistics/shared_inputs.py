"""Layers that read the same tensors, whose Gram matrices are accumulated once: queries, keys and values; gate and up.

Before the first batch all layers of one size share one accumulator of no rows. They part while the model runs, where
one reads a tensor that another does not: each continues from the rows that both have read. So the sums are exact for
every model, and no batch is read twice.
"""

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count
from weakref import ReferenceType, ref

from torch import Tensor, nn

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.capture.layer_calls import LayerCall
from fedbasin.strategies.fusion.layers import Layer
from fedbasin.strategies.fusion.update import tensor_names
from fedbasin.strategies.statistics.gram_accumulators import GramAccumulator, zero_accumulator


class InputNumbers:
    """Numbers for the inputs of one forward pass: one number for one tensor read with one kernel."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, tuple[ReferenceType[Tensor], int]] = {}
        self._numbers = count()

    def number(self, call: LayerCall) -> int:
        """Return the number of the inputs that a call has just read; writing into a tensor gives it a new number."""
        inputs = call.inputs
        # Inference tensors do not count the writes into them, so each reading counts as a new tensor.
        if inputs.is_inference():
            return next(self._numbers)
        key = id(inputs), inputs._version, call.kernel
        entry = self._tensors.get(key)
        # The address may belong to another tensor by now.
        if entry is None or entry[0]() is not inputs:
            entry = self._tensors[key] = ref(inputs), next(self._numbers)
        return entry[1]


@dataclass(eq=False)
class _Group:
    """Layers that have read the same tensors.

    Attributes:
        accumulator: sum over their rows.
        members: the layers.
        latest: number of the tensor that was read last.
        waiting: the members that have not read it yet.
        previous: the sum without that tensor, as long as members wait.
    """

    accumulator: GramAccumulator
    members: set[Block] = field(default_factory=set)
    latest: int | None = None
    waiting: set[Block] = field(default_factory=set)
    previous: GramAccumulator | None = None


class SharedAccumulators:
    """Accumulators of the inputs of some layers; layers that have read the same tensors share one object."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], encodings: Mapping[Block, Encoding]) -> None:
        """Start without rows.

        Args:
            model: the model.
            layers: layers of the model.
            encodings: encodings in which the layers are sent; layers with different ones share nothing.
        """
        self._groups: dict[Block, _Group] = {}
        groups: dict[Hashable, _Group] = {}
        for layer in layers:
            block, encoding = layer.block, encodings.get(layer.block, Encoding())
            device = model.get_parameter(tensor_names(block)[0]).device
            # A grouped convolution has several matrices, each for its own part of the outputs.
            alone = block if layer.groups > 1 else None
            key = layer.inputs, len(block), encoding.gram, device, alone
            if key not in groups:
                groups[key] = _Group(zero_accumulator(layer, encoding, device))
            self._groups[block] = groups[key]
            groups[key].members.add(block)

    @property
    def accumulators(self) -> dict[Block, GramAccumulator]:
        """The accumulator of each layer."""
        return {block: group.accumulator for block, group in self._groups.items()}

    def accumulator_for(self, block: Block, number: int) -> GramAccumulator | None:
        """Return the accumulator to which a layer's rows must be added at once.

        Args:
            block: the layer.
            number: number of the tensor that it reads in this forward pass.

        Returns:
            the accumulator, or None where another layer has added the same rows.
        """
        group = self._groups[block]
        if number == group.latest and block in group.waiting:
            group.waiting.remove(block)
            group.previous = group.previous if group.waiting else None
            return None
        self._part(group)
        group = self._groups[block]
        group.latest, group.waiting = number, group.members - {block}
        # Copied only while layers wait: most layers share with nobody.
        group.previous = deepcopy(group.accumulator) if group.waiting else None
        return group.accumulator

    def end_pass(self) -> None:
        """End a forward pass: layers that still wait have not read the tensor that the others have."""
        for group in set(self._groups.values()):
            self._part(group)

    def _part(self, group: _Group) -> None:
        """Move the waiting layers into a group of their own."""
        if group.previous is None:
            return
        rest = _Group(group.previous, group.waiting)
        self._groups |= dict.fromkeys(rest.members, rest)
        group.members = group.members - rest.members
        group.waiting, group.previous = set(), None
