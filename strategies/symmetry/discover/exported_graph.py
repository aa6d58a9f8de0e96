"""Permutation spaces of a model that torch.fx cannot follow, read from what torch.export makes of it.

An exported program is a list of ATen operators on tensors, without modules and without Python: whatever the forward pass
decides by shapes has been decided as the example's shapes have it, so a symmetry that is read here is one for inputs
of those shapes. The rules are those of `rules`; operators that have none keep the places of what they read. Attention
is such an operator here: its heads stay, while the residual stream and hidden units are found.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fedbasin.strategies.symmetry.check import in_mode
from fedbasin.strategies.symmetry.discover.operations import (
    Feature,
    Rule,
    Walk,
    concatenated,
    elementwise,
    expanded,
    pooled,
    reduced,
    reshaped,
    shape,
    viewed,
)
from fedbasin.strategies.symmetry.discover.units import Units, UnitTable, aliases
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError


def trace_exported(model: nn.Module, *example_inputs: Tensor) -> Symmetry:
    """The permutation spaces of a model, as `trace` gives them, for inputs of the example's shapes.

    Args:
        model: any module that torch.export can export. It is left as it was.
        example_inputs: what its forward takes.

    Raises:
        SymmetryError: the model cannot be exported, as one that decides by data.
    """
    walk = Walk(model, UnitTable(aliases(model)))
    for training in (False, True):
        _Program(walk, _exported(model, example_inputs, training=training)).follow()
    return Symmetry(tuple(walk.table.spaces()))


def _exported(model: nn.Module, inputs: tuple[Tensor, ...], *, training: bool) -> ExportedProgram:
    with in_mode(model, training=training):
        try:
            return torch.export.export(model, inputs)
        except Exception as error:  # exporting runs the model's own code, which may raise anything
            reason = str(error).partition("\n")[0]
            raise SymmetryError(
                f"{type(model).__name__} cannot be exported by torch.export: {reason}; write the symmetry "
                "in the notation and read it with `parse`"
            ) from error


@dataclass(frozen=True)
class _Program:
    walk: Walk
    program: ExportedProgram

    def follow(self) -> None:
        for node in self.program.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                node.meta["shape"] = tuple(value.shape)
            feature = self._feature(node)
            if feature is not None:
                self.walk.features[node] = feature

    def _feature(self, node: fx.Node) -> Feature | None:
        if node.op == "placeholder":
            return self._parameter(node)
        if node.op != "call_function":
            return self.walk.leave(node)
        name = _operator(node)
        if name in _LAYERS:
            return _LAYERS[name](self, node)
        if not self.walk.of(node):
            return None
        rule = _PLAIN.get(name)
        first = node.all_input_nodes[0] in self.walk.features
        if rule is None or shape(node) is None or not (first or rule in _ANY):
            return self.walk.leave(node)
        return rule(self.walk, node)

    def _parameter(self, node: fx.Node) -> Feature | None:
        """What is no layer's own, as positions and scales, has its units on its last long axis."""
        name = self.name(node)
        long = [axis for axis, length in enumerate(shape(node) or ()) if length > 1]
        if name is None or not long or all(_is_own(node, user) for user in node.users):
            return None
        units = self.walk.table.new(name, (shape(node) or ())[long[-1]])
        for axis in range(len(shape(node) or ())):
            self.walk.table.bind(name, axis, units if axis == long[-1] else self.walk.fixed)
        return Feature(units, long[-1])

    def name(self, node: Any) -> str | None:
        """The name of a parameter or buffer that can be followed."""
        if not isinstance(node, fx.Node):
            return None
        signature = self.program.graph_signature
        known = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        found = known.get(node.name)
        return found if found in self.walk.table.aliases else None

    def names(self, node: fx.Node, places: Iterable[int]) -> list[str] | None:
        """The parameters among an operator's arguments; None if one of them is computed."""
        given = [node.args[place] for place in places if place < len(node.args)]
        found = [self.name(argument) for argument in given if argument is not None]
        return None if None in found else [name for name in found if name is not None]

    def bind(self, names: Iterable[str], axis: int, units: Units) -> None:
        for name in names:
            self.walk.table.bind(name, axis, units)

    def written(self, weight: str, width: int) -> Units:
        return self.walk.table.new(weight.rpartition(".")[0] or weight, width)


def _linear(program: _Program, node: fx.Node) -> Feature | None:
    names = program.names(node, (1, 2))
    if not names:
        return program.walk.leave(node)
    last = len(shape(node) or ()) - 1
    program.bind(names[:1], 1, program.walk.read(node, last))
    units = program.written(names[0], (shape(node) or ())[last])
    program.bind(names, 0, units)
    return Feature(units, last)


def _convolution(program: _Program, node: fx.Node) -> Feature | None:
    names, groups = program.names(node, (1, 2)), node.args[6] if len(node.args) > 6 else 1
    if not names:
        return program.walk.leave(node)
    weight = program.walk.model.state_dict()[names[0]]
    channels = len(shape(node) or ()) - weight.dim() + 1
    read = program.walk.read(node, channels)
    if groups == 1:
        program.bind(names[:1], 1, read)
        units = program.written(names[0], len(weight))
        program.bind(names, 0, units)
        return Feature(units, channels)
    program.bind(names[:1], 1, program.walk.fixed)
    if read is not program.walk.fixed:
        read.whole(int(str(groups)))
    return _scaled(program, names, read, channels)


def _scaled(program: _Program, names: list[str], units: Units, axis: int) -> Feature | None:
    program.bind(names, 0, units)
    return None if units is program.walk.fixed else Feature(units, axis)


def _batch_norm(program: _Program, node: fx.Node) -> Feature | None:
    names = program.names(node, (1, 2, 3, 4))
    if names is None:
        return program.walk.leave(node)
    return _scaled(program, names, program.walk.read(node, 1), 1)


def _layer_norm(program: _Program, node: fx.Node) -> Feature | None:
    names, lengths = program.names(node, (2, 3)), node.args[1]
    if names is None or not isinstance(lengths, list | tuple):
        return program.walk.leave(node)
    feature = program.walk.features.get(node.all_input_nodes[0])
    first = len(shape(node) or ()) - len(lengths)
    for axis in range(len(lengths)):
        ours = feature is not None and feature.axis == first + axis
        program.bind(names, axis, feature.units if feature and ours else program.walk.fixed)
    return feature


def _embedding(program: _Program, node: fx.Node) -> Feature | None:
    names = program.names(node, (0,))
    if not names:
        return program.walk.leave(node)
    program.bind(names, 0, program.walk.fixed)
    last = len(shape(node) or ()) - 1
    units = program.written(names[0], (shape(node) or ())[last])
    program.bind(names, 1, units)
    return Feature(units, last)


_LAYERS = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "embedding": _embedding,
}

# Where an operator's own parameters stand among its arguments.
_OWN = {"layer_norm": (2, 3), "rms_norm": (2,), "embedding": (0,), "batch_norm": (1, 2, 3, 4)}

_ENTRIES = [
    "abs",
    "add",
    "alias",
    "clamp",
    "clone",
    "contiguous",
    "detach",
    "div",
    "dropout",
    "elu",
    "exp",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "log",
    "log_softmax",
    "masked_fill",
    "maximum",
    "minimum",
    "mish",
    "mul",
    "neg",
    "pow",
    "reciprocal",
    "relu",
    "relu6",
    "rsqrt",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "sqrt",
    "square",
    "sub",
    "tanh",
    "to",
    "where",
]

_PLAIN: dict[str, Rule] = {
    **{name: elementwise for entry in _ENTRIES for name in (entry, f"{entry}_")},
    **dict.fromkeys(("flatten", "reshape", "unflatten", "view"), reshaped),
    **dict.fromkeys(
        ("movedim", "permute", "select", "slice", "squeeze", "t", "transpose", "unsqueeze"), viewed
    ),
    "expand": expanded,
    "cat": concatenated,
    **dict.fromkeys(("amax", "amin", "logsumexp", "mean", "std", "sum", "var"), reduced),
    **dict.fromkeys(("adaptive_avg_pool1d", "avg_pool1d", "max_pool1d"), pooled(1)),
    **dict.fromkeys(("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d"), pooled(2)),
}

# Rules that look at all that they are given, not at the first.
_ANY = (elementwise, concatenated)


def _operator(node: fx.Node) -> str:
    packet = getattr(node.target, "_overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _is_own(parameter: fx.Node, user: fx.Node) -> bool:
    """Whether a layer uses a parameter as its weight or bias."""
    name = _operator(user)
    places = _OWN.get(name, (1, 2)) if name in _LAYERS else ()
    return user.args.index(parameter) in places if parameter in user.args else False
