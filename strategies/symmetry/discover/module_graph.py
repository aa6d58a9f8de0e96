"""Follow a model as a graph of modules, functions and methods, as torch.fx traces it.

Layers whose units may change places give a space each: `S(n)`, or `S(c) wr S(g)` if a group normalisation keeps g
runs of c channels together. The layers of torch that contain attention are followed as a whole. Inputs and outputs
keep their order, and so does every feature that meets an operation without a rule, so the symmetry need not be
complete. The argument is that of the permutation specifications of Git Re-Basin (Ainsworth et al. 2023, arXiv
2209.04836), here derived from the graph.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedbasin.strategies.symmetry.discover.attention_layers import LAYERS, is_plain
from fedbasin.strategies.symmetry.discover.layer_rules import MODULES
from fedbasin.strategies.symmetry.discover.operations import (
    FUNCTIONS,
    METHODS,
    PLAIN_MODULES,
    Feature,
    Rule,
    Walk,
    concatenated,
    elementwise,
    first_result,
    shape,
    shape_query,
)
from fedbasin.strategies.symmetry.discover.units import UnitTable, aliases
from fedbasin.strategies.symmetry.symmetry import SymmetryError
from fedbasin.strategies.tensors.batches import evaluating, in_mode


class UntraceableError(SymmetryError):
    """A model whose forward pass torch.fx cannot trace, or whose traced graph does not run on the example."""


def follow_modules(model: nn.Module, *example_inputs: Tensor | None) -> UnitTable:
    """Follow a model through its graphs for evaluation and, where these differ, training.

    Args:
        model: any module that torch.fx can trace; it is not changed.
        example_inputs: arguments of its forward method, in a batch of at least two.

    Raises:
        UntraceableError: torch.fx cannot trace the model, or its graph does not run on the example.
        SymmetryError: hooks run with the model.
    """
    evaluation = _graph(model, training=False)
    training = _graph(model, training=True)
    walk = Walk(model, UnitTable(aliases(model)))
    _follow(walk, model, evaluation, example_inputs)
    # Both graphs fill one table: a unit is free only if it is free in both.
    if str(training) != str(evaluation):
        _follow(walk, model, training, example_inputs)
    return walk.table


def _graph(model: nn.Module, *, training: bool) -> fx.Graph:
    kind = type(model).__name__
    # The tracer calls forward itself, so hooks of the whole model would silently not run.
    if _is_hooked(model):
        raise SymmetryError(f"{kind} has forward hooks or a replaced forward, which tracing cannot see; remove them")
    with in_mode(model, training=training):
        try:
            return fx.Tracer().trace(model)
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            raise UntraceableError(f"{kind} cannot be traced by torch.fx: {_cause(error)}") from error


def _follow(walk: Walk, model: nn.Module, graph: fx.Graph, inputs: tuple[Tensor | None, ...]) -> None:
    traced = fx.GraphModule(model, graph)
    # Shapes are taken in evaluation mode for both graphs, because BatchNorm would update its statistics in training.
    with evaluating(model), torch.no_grad():
        try:
            _Shapes(traced).run(*inputs)
        except Exception as error:  # the model's own code may raise anything
            shapes = ", ".join(str(None if tensor is None else tuple(tensor.shape)) for tensor in inputs)
            raise UntraceableError(
                f"{type(model).__name__} does not run on example inputs of shape {shapes}: {_cause(error)}"
            ) from error
    for node in traced.graph.nodes:
        walk.table.operation = _describe(walk, node)
        feature = _feature(walk, node)
        if feature is not None:
            walk.features[node] = feature


def _cause(error: Exception) -> str:
    # torch.fx adds a dump of the graph after the first line.
    return str(error).partition("\n")[0]


def _describe(walk: Walk, node: fx.Node) -> str:
    """Return the name of an operation for messages, and "" for inputs and outputs, which are fixed by nature."""
    if node.op == "call_module":
        return f"{type(walk.model.get_submodule(str(node.target))).__name__} {node.target!r}"
    if node.op == "get_attr":
        return f"the direct use of {node.target!r}"
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op == "call_function" and callable(node.target):
        name = torch.overrides.resolve_name(node.target)
        return name or f"{node.target.__module__.lstrip('_')}.{node.target.__name__}"
    return ""


class _Shapes(fx.Interpreter):
    """An interpreter that records the shape of every tensor on its node."""

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
    if not walk.input_features(node):
        return None
    if node.target is operator.getitem and shape(node.all_input_nodes[0]) is None:
        return first_result(walk, node)
    if node.op == "call_method":
        return _plain(walk, node, METHODS.get(str(node.target)))
    if node.op == "call_function":
        return _plain(walk, node, _function(node))
    return walk.leave(node)


def _parameter(walk: Walk, node: fx.Node) -> Feature | None:
    """Follow a parameter used by itself, such as positions or scales; its units are on its last axis longer than 1."""
    name, lengths = str(node.target), shape(node) or ()
    long = [axis for axis, length in enumerate(lengths) if length > 1]
    # A buffer may be a table of positions or a mask, whose order has a meaning outside the model.
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
        return shape_query
    return FUNCTIONS.get(node.target) if callable(node.target) else None


def _plain(walk: Walk, node: fx.Node, rule: Rule | None) -> Feature | None:
    """Apply the rule of an operation without parameters."""
    if rule is shape_query:
        return None
    if rule is None or shape(node) is None or node.kwargs.get("out") is not None:
        return walk.leave(node)
    # Other rules follow their first argument, so a feature that comes in by another way or by name is fixed.
    if rule not in (elementwise, concatenated) and not (node.args and node.args[0] in walk.features):
        return walk.leave(node)
    return rule(walk, node)


def _module(walk: Walk, node: fx.Node) -> Feature | None:
    name = str(node.target)
    module = walk.model.get_submodule(name)
    # Exact types, because a subclass may override the forward pass.
    if type(module) in LAYERS and _is_followed(walk, name, module):
        return LAYERS[type(module)](walk, node, module)
    # A module called with further arguments may use them in a way that its rule does not know.
    called_plainly = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
    if called_plainly and not _is_hooked(module) and _is_saved(walk, name, module):
        if type(module) in MODULES:
            return MODULES[type(module)](walk, node, module)
        if type(module) in PLAIN_MODULES:
            return _plain(walk, node, PLAIN_MODULES[type(module)]) if walk.input_features(node) else None
    _keep(walk, name)
    return walk.leave(node)


def _is_followed(walk: Walk, name: str, module: nn.Module) -> bool:
    """Return whether a layer with attention is as its class creates it and shares no tensor with another layer."""
    tensors = [f"{name}.{parameter}" for parameter in module.state_dict()]
    alone = all(walk.table.aliases.get(tensor) == (tensor,) for tensor in tensors)
    hooked = any(map(_is_hooked, module.modules()))
    return alone and not hooked and is_plain(module)


def _is_saved(walk: Walk, name: str, module: nn.Module) -> bool:
    """Return whether the module computes with tensors of the state, none of which overlaps another."""
    computed = {p for p in ("weight", "bias") if getattr(module, p, None) is not None}
    return all(f"{name}.{p}" in walk.table.aliases for p in computed | set(module.state_dict()))


def _is_hooked(module: nn.Module) -> bool:
    """Return whether calling the module runs anything besides the forward method of its class."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _keep(walk: Walk, name: str) -> None:
    """Fix every axis of a tensor, or of all tensors below a module."""
    for tensor, parameter in walk.model.state_dict().items():
        below = tensor == name or tensor.startswith(f"{name}.")
        if below and tensor in walk.table.aliases:
            if tensor != name:
                walk.table.stopped[walk.table.operation, tensor] = None
            for axis in range(parameter.dim()):
                walk.table.bind(tensor, axis, walk.fixed)
