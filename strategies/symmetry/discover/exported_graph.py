"""Follow a model as a program of torch.export, for models that torch.fx cannot follow.

An exported program is a list of ATen operators on tensors, without modules and without Python. The length of the
batch stays a variable where it can; decisions that the forward pass makes by other lengths are resolved as the
example requires, so the symmetry is valid for inputs whose shapes differ from the example only in the batch. The
rules are those of `operations.py`; operators without a rule fix the units that they read. Attention is such an
operator here: its heads stay in place, while the residual stream and hidden units are followed.
"""

import warnings
from collections.abc import Iterable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

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
from fedbasin.strategies.symmetry.symmetry import SymmetryError
from fedbasin.strategies.tensors.batches import in_mode


def follow_exported(model: nn.Module, *example_inputs: Tensor | None) -> UnitTable:
    """Follow a model through its exported programs for evaluation and training.

    Args:
        model: any module that torch.export can export; it is not changed.
        example_inputs: arguments of its forward method, in a batch of at least two.

    Raises:
        SymmetryError: the model cannot be exported, for example because it decides by data.
    """
    walk = Walk(model, UnitTable(aliases(model)))
    # Dropout and BatchNorm differ; a unit is free only if it is free in both programs.
    for training in (False, True):
        _Program(walk, _export(model, example_inputs, training=training)).follow()
    return walk.table


def _export(model: nn.Module, inputs: tuple[Tensor | None, ...], *, training: bool) -> ExportedProgram:
    # torch warns, and prints the program to stderr where it fails; the failure is raised in one line below.
    with in_mode(model, training=training), warnings.catch_warnings(action="ignore"), redirect_stderr(StringIO()):
        try:
            # With a constant length of the batch, `x[:, : len(x)]` would look as if it took every unit.
            shapes = tuple({0: torch.export.Dim.AUTO} if x is not None and x.dim() else None for x in inputs)
            return torch.export.export(model, inputs, dynamic_shapes=shapes)
        except Exception as error:  # exporting runs the model's own code, which may raise anything
            reason = str(error).partition("\n")[0]
            raise SymmetryError(f"{type(model).__name__} cannot be exported by torch.export: {reason}") from error


@dataclass(frozen=True)
class _Program:
    walk: Walk
    program: ExportedProgram

    def follow(self) -> None:
        for node in self.program.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                node.meta["shape"] = tuple(_length(length) for length in value.shape)
            self.walk.table.operation = f"aten.{_operator(node)}" if node.op == "call_function" else ""
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
        if not self.walk.input_features(node) or name == "sym_size":
            return None
        rule = _PLAIN.get(name)
        is_followed = node.all_input_nodes[0] in self.walk.features or rule in _ANY
        if rule is None or shape(node) is None or not is_followed:
            return self.walk.leave(node)
        return rule(self.walk, node)

    def _parameter(self, node: fx.Node) -> Feature | None:
        """Follow a parameter that is used outside of layers; its units are on its last axis longer than 1."""
        name = self.name(node)
        long = [axis for axis, length in enumerate(shape(node) or ()) if length > 1]
        if name is None or not long or all(_is_layer_parameter(node, user) for user in node.users):
            return None
        units = self.walk.table.new(name, (shape(node) or ())[long[-1]])
        for axis in range(len(shape(node) or ())):
            self.walk.table.bind(name, axis, units if axis == long[-1] else self.walk.fixed)
        return Feature(units, long[-1])

    def name(self, node: Any) -> str | None:
        """Return the name of a parameter or buffer that can be followed, or None for any other argument."""
        if not isinstance(node, fx.Node):
            return None
        signature = self.program.graph_signature
        name = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.get(node.name)
        return name if name in self.walk.table.aliases else None

    def names(self, node: fx.Node, places: Iterable[int]) -> list[str] | None:
        """Return the parameters among an operator's arguments, or None if one of the arguments is computed."""
        arguments = [node.args[place] for place in places if place < len(node.args)]
        names = [self.name(argument) for argument in arguments if argument is not None]
        return None if None in names else [name for name in names if name is not None]

    def bind(self, names: Iterable[str], axis: int, units: Units) -> None:
        for name in names:
            self.walk.table.bind(name, axis, units)

    def new_units(self, weight: str, width: int) -> Units:
        return self.walk.table.new(weight.rpartition(".")[0] or weight, width)


def _linear(program: _Program, node: fx.Node) -> Feature | None:
    names = program.names(node, (1, 2))
    if not names:
        return program.walk.leave(node)
    last = len(shape(node) or ()) - 1
    program.bind(names[:1], 1, program.walk.units_read(node, last))
    units = program.new_units(names[0], (shape(node) or ())[last])
    program.bind(names, 0, units)
    return Feature(units, last)


def _convolution(program: _Program, node: fx.Node) -> Feature | None:
    names, groups = program.names(node, (1, 2)), node.args[6] if len(node.args) > 6 else 1
    if not names:
        return program.walk.leave(node)
    weight = program.walk.model.state_dict()[names[0]]
    channels = len(shape(node) or ()) - weight.dim() + 1
    units_read = program.walk.units_read(node, channels)
    if groups == 1:
        program.bind(names[:1], 1, units_read)
        units = program.new_units(names[0], len(weight))
        program.bind(names, 0, units)
        return Feature(units, channels)
    program.bind(names[:1], 1, program.walk.fixed)
    if units_read is not program.walk.fixed:
        program.walk.table.move_runs(units_read, int(str(groups)))
    return _scale(program, names, units_read, channels)


def _scale(program: _Program, names: list[str], units: Units, axis: int) -> Feature | None:
    program.bind(names, 0, units)
    return None if units is program.walk.fixed else Feature(units, axis)


def _batch_norm(program: _Program, node: fx.Node) -> Feature | None:
    names = program.names(node, (1, 2, 3, 4))
    if names is None:
        return program.walk.leave(node)
    return _scale(program, names, program.walk.units_read(node, 1), 1)


def _layer_norm(program: _Program, node: fx.Node) -> Feature | None:
    names, lengths = program.names(node, (2, 3)), node.args[1]
    if names is None or not isinstance(lengths, list | tuple):
        return program.walk.leave(node)
    feature = program.walk.features.get(node.all_input_nodes[0])
    offset = len(shape(node) or ()) - len(lengths)
    for axis in range(len(lengths)):
        carries_units = feature is not None and feature.axis == offset + axis
        units = feature.units if feature and carries_units else program.walk.fixed
        program.bind(names, axis, units)
    return feature


def _embedding(program: _Program, node: fx.Node) -> Feature | None:
    names = program.names(node, (0,))
    if not names:
        return program.walk.leave(node)
    program.bind(names, 0, program.walk.fixed)
    last = len(shape(node) or ()) - 1
    units = program.new_units(names[0], (shape(node) or ())[last])
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

# The places of an operator's own parameters among its arguments.
_PARAMETER_PLACES = {"layer_norm": (2, 3), "rms_norm": (2,), "embedding": (0,), "batch_norm": (1, 2, 3, 4)}

_ENTRYWISE = (
    *("abs", "add", "alias", "clamp", "clone", "contiguous", "detach", "div", "dropout", "elu"),
    *("exp", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log_softmax"),
    *("masked_fill", "maximum", "minimum", "mish", "mul", "neg", "pow", "reciprocal", "relu"),
    *("relu6", "rsqrt", "sigmoid", "silu", "softmax", "softplus", "sqrt", "square", "sub", "tanh"),
    *("to", "where"),
)

_PLAIN: dict[str, Rule] = {
    **{name: elementwise for entry in _ENTRYWISE for name in (entry, f"{entry}_")},
    **dict.fromkeys(("flatten", "reshape", "unflatten", "view"), reshaped),
    **dict.fromkeys(("movedim", "permute", "select", "slice", "squeeze", "t", "transpose", "unsqueeze"), viewed),
    "expand": expanded,
    "cat": concatenated,
    **dict.fromkeys(("amax", "amin", "logsumexp", "mean", "std", "sum", "var"), reduced),
    **dict.fromkeys(("adaptive_avg_pool1d", "avg_pool1d", "max_pool1d"), pooled(1)),
    **dict.fromkeys(("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d"), pooled(2)),
}

# Rules that look at all arguments of an operator, not only at the first.
_ANY = (elementwise, concatenated)


def _length(length: int | torch.SymInt) -> int:
    """Return the length of an axis on the example."""
    return length if isinstance(length, int) else int(length.node.hint)


def _operator(node: fx.Node) -> str:
    packet = getattr(node.target, "_overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _is_layer_parameter(parameter: fx.Node, user: fx.Node) -> bool:
    """Return whether the operator of a layer uses a parameter as its weight or bias."""
    name = _operator(user)
    places = _PARAMETER_PLACES.get(name, (1, 2)) if name in _LAYERS else ()
    return user.args.index(parameter) in places if parameter in user.args else False
