"""Find the permutation symmetry of a model by following its features through a traced forward pass.

Layers whose units may change places give a space each: `S(n)`, and `S(c) wr S(g)` where a group normalisation
keeps g runs of c channels together. Inputs and outputs stay as they are, and so does every feature that meets
an operation without a rule: what is found is a symmetry, but it need not be all of it. The weight-sharing
argument is that of the permutation specifications of Git Re-Basin (Ainsworth et al. 2023, arXiv 2209.04836),
here read off the graph. Families with rotations (`transformer`) and anything else can be written in the
notation.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedbasin.strategies.symmetry.check import in_mode
from fedbasin.strategies.symmetry.discover.attention_layers import LAYERS, is_plain
from fedbasin.strategies.symmetry.discover.operations import (
    FUNCTIONS,
    METHODS,
    MODULES,
    PLAIN_MODULES,
    Feature,
    Rule,
    Walk,
    asked,
    concatenated,
    elementwise,
    shape,
    taken,
)
from fedbasin.strategies.symmetry.discover.units import UnitTable, aliases
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError


def trace(model: nn.Module, *example_inputs: Tensor) -> Symmetry:
    """The permutation spaces of a model, in forward order, named after the module that writes each.

    Training and evaluation are both followed where they differ. The model is left as it was.

    Args:
        model: any module that torch.fx can trace.
        example_inputs: what its forward takes; give a batch of at least two.

    Raises:
        SymmetryError: the model cannot be traced, or does not run on the example.
    """
    evaluation = _graph(model, training=False)
    training = _graph(model, training=True)
    walk = Walk(model, UnitTable(aliases(model)))
    _follow(walk, model, evaluation, example_inputs)
    if str(training) != str(evaluation):
        _follow(walk, model, training, example_inputs)
    return Symmetry(tuple(walk.table.spaces()), shifts=tuple(walk.table.shifts()))


def _graph(model: nn.Module, *, training: bool) -> fx.Graph:
    kind = type(model).__name__
    if _is_hooked(model):
        raise SymmetryError(
            f"{kind} has forward hooks or a forward of its own, which tracing cannot see; remove them"
        )
    with in_mode(model, training=training):
        try:
            return fx.Tracer().trace(model)
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            raise SymmetryError(
                f"{kind} cannot be traced by torch.fx: {_cause(error)}; keep the forward pass free of decisions "
                f"that depend on data, try `trace_exported`, or write the symmetry as text and read it with `parse`"
            ) from error


def _follow(walk: Walk, model: nn.Module, graph: fx.Graph, inputs: tuple[Tensor, ...]) -> None:
    traced = fx.GraphModule(model, graph)
    with in_mode(model, training=False), torch.no_grad():
        try:
            _Shapes(traced).run(*inputs)
        except Exception as error:  # the model's own code may raise anything
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
            raise SymmetryError(
                f"{type(model).__name__} does not run on example inputs of shape {shapes}: {_cause(error)}"
            ) from error
    for node in traced.graph.nodes:
        feature = _feature(walk, node)
        if feature is not None:
            walk.features[node] = feature


def _cause(error: Exception) -> str:
    """The first line of a message; torch.fx adds a dump of the graph."""
    return str(error).partition("\n")[0]


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor on its node."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


def _feature(walk: Walk, node: fx.Node) -> Feature | None:
    if node.op == "call_module":
        return _module(walk, node)
    if node.op == "get_attr":
        return _parameter(walk, node)
    if not walk.of(node):
        return None
    if node.target is operator.getitem and shape(node.all_input_nodes[0]) is None:
        return taken(walk, node)
    if node.op == "call_method":
        return _plain(walk, node, METHODS.get(str(node.target)))
    if node.op == "call_function":
        return _plain(walk, node, _function(node))
    return walk.leave(node)


def _parameter(walk: Walk, node: fx.Node) -> Feature | None:
    """A parameter by itself, as positions, class tokens or scales: its units are on its last long axis."""
    name, lengths = str(node.target), shape(node) or ()
    long = [axis for axis, length in enumerate(lengths) if length > 1]
    parameter = walk.model.state_dict(keep_vars=True).get(name)
    if not long or not isinstance(parameter, nn.Parameter) or name not in walk.table.aliases:
        _keep(walk, name)
        return None
    units = walk.table.new(name, lengths[long[-1]])
    for axis in range(len(lengths)):
        walk.table.bind(name, axis, units if axis == long[-1] else walk.fixed)
    return Feature(units, long[-1])


def _function(node: fx.Node) -> Rule | None:
    if node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device"):
        return asked
    return FUNCTIONS.get(node.target) if callable(node.target) else None


def _plain(walk: Walk, node: fx.Node, rule: Rule | None) -> Feature | None:
    """Apply a rule for an operation without parameters."""
    if rule is asked:
        return None
    if rule is None or shape(node) is None or node.kwargs.get("out") is not None:
        return walk.leave(node)
    if rule not in (elementwise, concatenated) and not (
        node.args and node.args[0] in walk.features
    ):
        return walk.leave(node)
    return rule(walk, node)


def _module(walk: Walk, node: fx.Node) -> Feature | None:
    name = str(node.target)
    module = walk.model.get_submodule(name)
    if type(module) in LAYERS and _is_followed(walk, name, module):
        return LAYERS[type(module)](walk, node, module)
    called_plainly = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
    if called_plainly and not _is_hooked(module) and _is_saved(walk, name, module):
        if type(module) in MODULES:
            return MODULES[type(module)](walk, node, module)
        if type(module) in PLAIN_MODULES:
            return _plain(walk, node, PLAIN_MODULES[type(module)]) if walk.of(node) else None
    _keep(walk, name)
    return walk.leave(node)


def _is_followed(walk: Walk, name: str, module: nn.Module) -> bool:
    """Whether a layer with attention is as its class makes it, and its tensors are no other's."""
    tensors = [f"{name}.{parameter}" for parameter in module.state_dict()]
    alone = all(walk.table.aliases.get(tensor) == (tensor,) for tensor in tensors)
    hooked = any(map(_is_hooked, module.modules()))
    return alone and not hooked and is_plain(module)


def _is_saved(walk: Walk, name: str, module: nn.Module) -> bool:
    """Whether what the module computes with are tensors of the state, none overlapping another."""
    computed = {p for p in ("weight", "bias") if getattr(module, p, None) is not None}
    return all(f"{name}.{p}" in walk.table.aliases for p in computed | set(module.state_dict()))


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs more than its class's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _keep(walk: Walk, name: str) -> None:
    """Fix every axis of a tensor, or of all tensors below a module."""
    for tensor, parameter in walk.model.state_dict().items():
        below = tensor == name or tensor.startswith(f"{name}.")
        if below and tensor in walk.table.aliases:
            for axis in range(parameter.dim()):
                walk.table.bind(tensor, axis, walk.fixed)
