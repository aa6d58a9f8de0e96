"""The rules by which tracing follows features through the operations of a model.

A *feature* is the axis of a value along which units are arranged in order, each owning an equal run of entries. A
value without a feature is the same under every transform. Each rule looks up the features of an operation's inputs,
binds the operation's parameters, and returns the feature of the result. Where a rule does not apply, the units
involved are fixed, which is always correct.
"""

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fedbasin.strategies.symmetry.discover.units import Units, UnitTable


@dataclass(frozen=True)
class Feature:
    """The axis of a value along which units are arranged."""

    units: Units
    axis: int


@dataclass
class Walk:
    """The state of following a model: its units so far, and the feature of each value."""

    model: nn.Module
    table: UnitTable
    features: dict[fx.Node, Feature] = field(default_factory=dict)
    fixed: Units = field(default_factory=lambda: Units("", 0, fixed=True))

    def input_features(self, node: fx.Node) -> list[Feature]:
        """Return the features among the inputs of an operation."""
        return [self.features[n] for n in node.all_input_nodes if n in self.features]

    def leave(self, node: fx.Node) -> Feature | None:
        """Fix the units that an operation reads; its result has no feature."""
        for feature in self.input_features(node):
            self.table.fix(feature.units)
        return None

    def units_read(self, node: fx.Node, axis: int) -> Units:
        """Return the units along an axis of the first input of an operation."""
        feature = self.features.get(source(node))
        if feature is None:
            return self.fixed
        if feature.axis != axis:
            self.table.fix(feature.units)
            return self.fixed
        return feature.units

    def bind(self, node: fx.Node, names: Iterable[str], axis: int, units: Units) -> None:
        """Bind an axis of those of the named parameters that the called module has."""
        module = self.model.get_submodule(str(node.target))
        for name in names:
            if getattr(module, name, None) is not None:
                self.table.bind(f"{node.target}.{name}", axis, units)

    def write(self, node: fx.Node, width: int, axis: int) -> Units:
        """Return new units, written by a module with an axis of its weight."""
        units = self.table.new(str(node.target), width)
        self.bind(node, ("weight",), axis, units)
        return units


ModuleRule = Callable[[Walk, fx.Node, Any], Feature | None]
Rule = Callable[[Walk, fx.Node], Feature | None]


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a value on the example inputs, or None if it is not a tensor."""
    return node.meta.get("shape")


def dims(node: fx.Node) -> int:
    """Return the number of dimensions of a tensor."""
    return len(_shape(node))


def source(node: fx.Node) -> fx.Node:
    """Return the first value that an operation reads."""
    return node.all_input_nodes[0]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["shape"])


def elementwise(walk: Walk, node: fx.Node) -> Feature | None:
    """Follow an operation entry by entry, or a normalisation that is the same for every order of the entries."""
    values = [n for n in node.all_input_nodes if shape(n) is not None]
    # Values without a feature are the same under every transform, so they may only be constant along the units.
    featured = [n for n in values if n in walk.features]
    if not featured:
        return None
    # Broadcasting aligns axes from the right.
    places = {walk.features[n].axis - dims(n) for n in featured}
    axis = dims(node) + min(places)
    if len(places) > 1 or not all(_fits(walk, n, node, axis) for n in values):
        return walk.leave(node)
    units = [walk.features[n].units for n in featured]
    return Feature(reduce(walk.table.unite, units), axis)


def _fits(walk: Walk, value: fx.Node, node: fx.Node, axis: int) -> bool:
    """Return whether a value has the feature along the axis of the result, or one entry for all units."""
    own_axis = axis - dims(node) + dims(value)
    length = _shape(value)[own_axis] if own_axis >= 0 else 1
    return length == (_shape(node)[axis] if value in walk.features else 1)


def reshaped(walk: Walk, node: fx.Node) -> Feature | None:
    """Follow a reshape, which keeps a feature if its units still begin an axis and own whole entries of it."""
    feature = walk.features[source(node)]
    entries_before = math.prod(_shape(source(node))[: feature.axis])
    for axis, length in enumerate(_shape(node)):
        begins = math.prod(_shape(node)[:axis]) == entries_before
        if begins and length and length % feature.units.width == 0:
            return Feature(feature.units, axis)
    return walk.leave(node)


def viewed(walk: Walk, node: fx.Node) -> Feature | None:
    """Follow axes that change places or disappear; the axis of the feature is recognised by its stride."""
    feature = walk.features[source(node)]
    if len(node.all_input_nodes) > 1:
        return walk.leave(node)
    # On the meta device: only the layout of the result matters, and nothing is computed.
    strides = [_FIRST_STRIDE + axis for axis in range(dims(source(node)))]
    result = _apply(node, torch.empty_strided(_shape(source(node)), strides, device="meta"))
    marker = (_shape(source(node))[feature.axis], strides[feature.axis])
    axes = [i for i, pair in enumerate(zip(result.shape, result.stride(), strict=True)) if pair == marker]
    return Feature(feature.units, axes[0]) if len(axes) == 1 else walk.leave(node)


def expanded(walk: Walk, node: fx.Node) -> Feature | None:
    """Follow an expansion, which repeats axes of length 1 or adds axes in front."""
    feature = walk.features[source(node)]
    axis = feature.axis - dims(source(node)) + dims(node)
    is_kept = _shape(source(node))[feature.axis] == _shape(node)[axis]
    return Feature(feature.units, axis) if is_kept else walk.leave(node)


def concatenated(walk: Walk, node: fx.Node) -> Feature | None:
    """Follow a concatenation along any axis but that of the feature, which would hold two sets of units."""
    values = [n for n in node.all_input_nodes if shape(n) is not None]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    axes = {walk.features[n].axis if n in walk.features else -1 for n in values}
    if len(axes) > 1 or not isinstance(axis, int) or axis % dims(node) in axes or -1 in axes:
        return walk.leave(node)
    units = [walk.features[n].units for n in values]
    return Feature(reduce(walk.table.unite, units), axes.pop())


def first_result(walk: Walk, node: fx.Node) -> Feature | None:
    """Follow the choice of one of several results; the first has the feature, as attention returns weights second."""
    return walk.features[source(node)] if node.args[1] == 0 else None


def reduced(walk: Walk, node: fx.Node) -> Feature | None:
    """Follow a reduction; one over the axis of the feature has the same result for every order of the units."""
    feature = walk.features[source(node)]
    if len(node.all_input_nodes) > 1:
        return walk.leave(node)
    # All axes have different lengths, so that the axes that remain can be recognised.
    result = _apply(node, torch.empty(list(range(2, 2 + dims(source(node)))), device="meta"))
    lengths = list(result.shape)
    marker = 2 + feature.axis
    return Feature(feature.units, lengths.index(marker)) if marker in lengths else None


def _apply(node: fx.Node, tensor: torch.Tensor) -> torch.Tensor:
    arguments = (tensor, *node.args[1:])
    if isinstance(node.target, str):
        return getattr(torch.Tensor, node.target)(*arguments, **node.kwargs)
    return node.target(*arguments, **node.kwargs)


def pooled(axes: int) -> Rule:
    """Return the rule of an operation on windows of the last `axes` axes, channel by channel."""

    def rule(walk: Walk, node: fx.Node) -> Feature | None:
        feature = walk.features[source(node)]
        return feature if feature.axis < dims(node) - axes else walk.leave(node)

    return rule


def _resized(walk: Walk, node: fx.Node) -> Feature | None:
    feature = walk.features[source(node)]
    return feature if feature.axis == 1 else walk.leave(node)


def shape_query(walk: Walk, node: fx.Node) -> None:
    """Follow a query of shape or type, whose answer is the same for every order of the units."""


# Strides that no operation produces by itself.
_FIRST_STRIDE = 1 << 40

_ENTRYWISE = (
    *("abs", "add", "clamp", "clamp_max", "clamp_min", "div", "exp", "log", "masked_fill"),
    *("maximum", "minimum", "mul", "neg", "pow", "reciprocal", "relu", "rsqrt", "sigmoid"),
    *("sqrt", "square", "sub", "tanh", "log_softmax", "softmax"),
)
_ACTIVATIONS = (
    *("alpha_dropout", "celu", "dropout", "dropout2d", "elu", "gelu", "hardsigmoid", "hardswish"),
    *("hardtanh", "leaky_relu", "log_softmax", "logsigmoid", "mish", "normalize", "relu", "relu6"),
    *("selu", "sigmoid", "silu", "softmax", "softplus", "softsign", "tanh"),
)
_OPERATORS = ("add", "sub", "mul", "truediv", "neg", "pow", "iadd", "isub", "imul", "itruediv")
_CASTS = ("bfloat16", "clone", "contiguous", "detach", "double", "float", "half", "to")
_RESHAPES = ("flatten", "ravel", "reshape", "unflatten")
_VIEWS = ("movedim", "permute", "squeeze", "swapaxes", "t", "transpose", "unsqueeze")
_REDUCTIONS = ("amax", "amin", "logsumexp", "mean", "std", "sum", "var")

_ELEMENTWISE_MODULES = (
    *("AlphaDropout", "Dropout", "Dropout1d", "Dropout2d", "FeatureAlphaDropout", "Identity"),
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU"),
    *("LogSigmoid", "Mish", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink"),
    *("Softsign", "Tanh", "Tanhshrink", "Threshold", "LogSoftmax", "Softmax", "Softmax2d"),
)
_POOL_FUNCTIONS = ("adaptive_avg_pool", "adaptive_max_pool", "avg_pool", "max_pool")
_POOLS = ("AdaptiveAvgPool", "AdaptiveMaxPool", "AvgPool", "LPPool", "MaxPool")


def _named(library: Any, names: Iterable[str], rule: Rule) -> dict[Any, Rule]:
    """Return the rule for those of the named functions or classes that a library has."""
    return {getattr(library, name): rule for name in names if hasattr(library, name)}


PLAIN_MODULES: dict[type[nn.Module], Rule] = {
    **_named(nn, _ELEMENTWISE_MODULES, elementwise),
    **_named(nn, [f"{pool}1d" for pool in _POOLS], pooled(1)),
    **_named(nn, [f"{pool}2d" for pool in _POOLS], pooled(2)),
    **_named(nn, ("Flatten", "Unflatten"), reshaped),
    nn.Upsample: _resized,
}
"""The rules of modules without parameters."""

METHODS: dict[str, Rule] = {
    **{name: elementwise for method in _ENTRYWISE for name in (method, f"{method}_")},
    **dict.fromkeys(_CASTS, elementwise),
    **dict.fromkeys((*_RESHAPES, "view"), reshaped),
    **dict.fromkeys(_VIEWS, viewed),
    **dict.fromkeys(("expand", "expand_as"), expanded),
    **dict.fromkeys(_REDUCTIONS, reduced),
    **dict.fromkeys(("dim", "numel", "size"), shape_query),
}
"""The rules of methods of tensors."""

FUNCTIONS: dict[Callable[..., Any], Rule] = {
    **_named(torch, (*_ENTRYWISE, "where", "clone"), elementwise),
    **_named(operator, _OPERATORS, elementwise),
    **_named(F, _ACTIVATIONS, elementwise),
    **_named(torch, _RESHAPES, reshaped),
    **_named(torch, _VIEWS, viewed),
    operator.getitem: viewed,
    **_named(torch, ("cat", "concat"), concatenated),
    **_named(torch, _REDUCTIONS, reduced),
    **_named(F, [f"{pool}1d" for pool in _POOL_FUNCTIONS], pooled(1)),
    **_named(F, [f"{pool}2d" for pool in _POOL_FUNCTIONS], pooled(2)),
    F.interpolate: _resized,
}
"""The rules of functions and operators."""
