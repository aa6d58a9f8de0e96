"""What operations do to features: the rules by which tracing follows a model.

A *feature* is one axis of a value along which the units of a space stand in order, each owning an equal run of
entries. A value without a feature is the same under every transform. Each rule reads the features of an
operation's inputs, binds its parameters, and says which axis of the result is a feature; where it cannot, it
fixes the spaces involved, which is always right.
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
    """An axis of a value that carries the units of a space."""

    units: Units
    axis: int


@dataclass
class Walk:
    """A model as far as it has been followed."""

    model: nn.Module
    table: UnitTable
    features: dict[fx.Node, Feature] = field(default_factory=dict)
    fixed: Units = field(default_factory=lambda: Units("", 0, fixed=True))

    def of(self, node: fx.Node) -> list[Feature]:
        """The features among the inputs of an operation."""
        return [self.features[n] for n in node.all_input_nodes if n in self.features]

    def leave(self, node: fx.Node) -> Feature | None:
        """Fix what goes into an operation; the result has no feature."""
        for feature in self.of(node):
            feature.units.fix()
        return None

    def read(self, node: fx.Node, axis: int) -> Units:
        """The space that an operation meets on an axis of its first input."""
        feature = self.features.get(_source(node))
        if feature is None:
            return self.fixed
        if feature.axis != axis:
            feature.units.fix()
            return self.fixed
        return feature.units

    def bind(self, node: fx.Node, names: Iterable[str], axis: int, units: Units) -> None:
        """Bind an axis of those parameters that the called module has."""
        module = self.model.get_submodule(str(node.target))
        for name in names:
            if getattr(module, name, None) is not None:
                self.table.bind(f"{node.target}.{name}", axis, units)

    def write(self, node: fx.Node, width: int, axis: int) -> Units:
        """The space of the units that a module writes with an axis of its weight."""
        units = self.table.new(str(node.target), width)
        self.bind(node, ("weight",), axis, units)
        return units


ModuleRule = Callable[[Walk, fx.Node, Any], Feature | None]
Rule = Callable[[Walk, fx.Node], Feature | None]


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape that the example gave a value; None for what is no tensor."""
    return node.meta.get("shape")


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["shape"])


def _dims(node: fx.Node) -> int:
    return len(_shape(node))


def _source(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


# Modules


def _linear(walk: Walk, node: fx.Node, module: nn.Linear) -> Feature:
    last = _dims(node) - 1
    walk.bind(node, ("weight",), 1, walk.read(node, last))
    units = walk.write(node, module.out_features, 0)
    walk.bind(node, ("bias",), 0, units)
    return Feature(units, last)


def _convolution(walk: Walk, node: fx.Node, module: nn.Conv2d) -> Feature | None:
    channels = _dims(node) - module.weight.dim() + 1
    if module.groups == 1:
        walk.bind(node, ("weight",), 1, walk.read(node, channels))
        units = walk.write(node, module.out_channels, 0)
        walk.bind(node, ("bias",), 0, units)
        return Feature(units, channels)
    # Outputs belong to their group of inputs: groups move as wholes, a channel each if it is depthwise.
    walk.bind(node, ("weight",), 1, walk.fixed)
    units = walk.read(node, channels)
    if units is not walk.fixed:
        units.whole(module.groups)
    return _scale(walk, node, channels, ("weight", "bias"))


def _scale(walk: Walk, node: fx.Node, axis: int, names: Iterable[str]) -> Feature | None:
    units = walk.read(node, axis)
    walk.bind(node, names, 0, units)
    return None if units is walk.fixed else Feature(units, axis)


def _batch_norm(walk: Walk, node: fx.Node, module: nn.BatchNorm2d) -> Feature | None:  # noqa: ARG001
    return _scale(walk, node, 1, ("weight", "bias", "running_mean", "running_var"))


def _group_norm(walk: Walk, node: fx.Node, module: nn.GroupNorm) -> Feature | None:
    units = walk.read(node, 1)
    if 1 < module.num_groups < module.num_channels:
        if units.width == module.num_channels:
            units.grouped(module.num_groups)
        else:
            units.fix()
    return _scale(walk, node, 1, ("weight", "bias"))


def _layer_norm(walk: Walk, node: fx.Node, module: nn.LayerNorm | nn.RMSNorm) -> Feature | None:
    feature = walk.features.get(_source(node))
    first = _dims(node) - len(module.normalized_shape)
    for axis in range(len(module.normalized_shape)):
        ours = feature is not None and feature.axis == first + axis
        units = feature.units if feature is not None and ours else walk.fixed
        walk.bind(node, ("weight", "bias"), axis, units)
    return feature


def _prelu(walk: Walk, node: fx.Node, module: nn.PReLU) -> Feature | None:
    if module.num_parameters > 1:
        return _scale(walk, node, 1, ("weight",))
    walk.bind(node, ("weight",), 0, walk.fixed)
    return elementwise(walk, node)


def _embedding(walk: Walk, node: fx.Node, module: nn.Embedding) -> Feature | None:
    walk.leave(node)
    walk.bind(node, ("weight",), 0, walk.fixed)
    if module.max_norm is not None:  # the table is written to in the forward pass
        walk.bind(node, ("weight",), 1, walk.fixed)
        return None
    return Feature(walk.write(node, module.embedding_dim, 1), _dims(node) - 1)


# Operations without parameters


def elementwise(walk: Walk, node: fx.Node) -> Feature | None:
    """Operations entry by entry, and normalisations that are the same for every order of the entries."""
    values = [n for n in node.all_input_nodes if shape(n) is not None]
    featured = [n for n in values if n in walk.features]
    if not featured:
        return None
    # Broadcasting aligns axes from the right.
    places = {walk.features[n].axis - _dims(n) for n in featured}
    axis = _dims(node) + min(places)
    if len(places) > 1 or not all(_fits(walk, n, node, axis) for n in values):
        return walk.leave(node)
    spaces = [walk.features[n].units for n in featured]
    return Feature(reduce(walk.table.join, spaces), axis)


def _fits(walk: Walk, value: fx.Node, node: fx.Node, axis: int) -> bool:
    """Whether a value has the feature along the axis, or the same entry for all units."""
    own = axis - _dims(node) + _dims(value)
    length = _shape(value)[own] if own >= 0 else 1
    return length == (_shape(node)[axis] if value in walk.features else 1)


def reshaped(walk: Walk, node: fx.Node) -> Feature | None:
    """Reshapes keep a feature if its units still begin an axis and every unit has whole entries of it."""
    feature = walk.features[_source(node)]
    before = math.prod(_shape(_source(node))[: feature.axis])
    for axis, length in enumerate(_shape(node)):
        begins = math.prod(_shape(node)[:axis]) == before
        if begins and length and length % feature.units.width == 0:
            return Feature(feature.units, axis)
    return walk.leave(node)


def viewed(walk: Walk, node: fx.Node) -> Feature | None:
    """Axes that change places or disappear: the feature is found again by its stride."""
    source, feature = _source(node), walk.features[_source(node)]
    if len(node.all_input_nodes) > 1:
        return walk.leave(node)
    strides = [_FIRST_STRIDE + axis for axis in range(_dims(source))]
    result = _apply(node, torch.empty_strided(_shape(source), strides, device="meta"))
    wanted = (_shape(source)[feature.axis], strides[feature.axis])
    found = [
        i
        for i, pair in enumerate(zip(result.shape, result.stride(), strict=True))
        if pair == wanted
    ]
    return Feature(feature.units, found[0]) if len(found) == 1 else walk.leave(node)


def expanded(walk: Walk, node: fx.Node) -> Feature | None:
    """Axes are repeated or put in front; the feature's is not, as it is long."""
    source, feature = _source(node), walk.features[_source(node)]
    axis = feature.axis - _dims(source) + _dims(node)
    same = _shape(source)[feature.axis] == _shape(node)[axis]
    return Feature(feature.units, axis) if same else walk.leave(node)


def concatenated(walk: Walk, node: fx.Node) -> Feature | None:
    """Values one after another along an axis: those along their feature would be two spaces in one."""
    values = [n for n in node.all_input_nodes if shape(n) is not None]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    axes = {walk.features[n].axis if n in walk.features else -1 for n in values}
    if len(axes) > 1 or not isinstance(axis, int) or axis % _dims(node) in axes or -1 in axes:
        return walk.leave(node)
    spaces = [walk.features[n].units for n in values]
    return Feature(reduce(walk.table.join, spaces), axes.pop())


def taken(walk: Walk, node: fx.Node) -> Feature | None:
    """A part of several results, of which the first has the feature: attention gives its weights beside."""
    return walk.features[_source(node)] if node.args[1] == 0 else None


def reduced(walk: Walk, node: fx.Node) -> Feature | None:
    """Sums and their like: over the feature the result is the same for every order of the units."""
    source, feature = _source(node), walk.features[_source(node)]
    if len(node.all_input_nodes) > 1:
        return walk.leave(node)
    # Axes of different lengths, so that those that remain can be told apart.
    result = _apply(node, torch.empty(list(range(2, 2 + _dims(source))), device="meta"))
    lengths = list(result.shape)
    kept = 2 + feature.axis
    return Feature(feature.units, lengths.index(kept)) if kept in lengths else None


def _apply(node: fx.Node, tensor: torch.Tensor) -> torch.Tensor:
    arguments = (tensor, *node.args[1:])
    if isinstance(node.target, str):
        return getattr(torch.Tensor, node.target)(*arguments, **node.kwargs)
    return node.target(*arguments, **node.kwargs)


def pooled(axes: int) -> Rule:
    """Windows over the last axes, channel by channel."""

    def rule(walk: Walk, node: fx.Node) -> Feature | None:
        feature = walk.features[_source(node)]
        return feature if feature.axis < _dims(node) - axes else walk.leave(node)

    return rule


def _resized(walk: Walk, node: fx.Node) -> Feature | None:
    feature = walk.features[_source(node)]
    return feature if feature.axis == 1 else walk.leave(node)


def asked(walk: Walk, node: fx.Node) -> None:
    """Questions about shapes, whose answers are the same for every order of the units."""


# Strides that no operation makes by itself.
_FIRST_STRIDE = 1 << 40

_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}

_ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.AlphaDropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.FeatureAlphaDropout, nn.Identity),
    *(
        nn.CELU,
        nn.ELU,
        nn.GELU,
        nn.Hardshrink,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Hardtanh,
        nn.LeakyReLU,
    ),
    *(nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus),
    *(nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
    *(nn.LogSoftmax, nn.Softmax, nn.Softmax2d),
)

_POOLS: dict[int, tuple[type[nn.Module], ...]] = {
    1: (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.AvgPool1d, nn.LPPool1d, nn.MaxPool1d),
    2: (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.MaxPool2d),
}

MODULES: dict[type[nn.Module], ModuleRule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
}
"""Modules with parameters."""

PLAIN_MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(_ELEMENTWISE_MODULES, elementwise),
    **{kind: pooled(axes) for axes, kinds in _POOLS.items() for kind in kinds},
    nn.Flatten: reshaped,
    nn.Unflatten: reshaped,
    nn.Upsample: _resized,
}
"""Modules without parameters."""

_ENTRY_METHODS = (
    *(
        "abs",
        "add",
        "clamp",
        "clamp_max",
        "clamp_min",
        "div",
        "exp",
        "log",
        "masked_fill",
        "maximum",
    ),
    *(
        "minimum",
        "mul",
        "neg",
        "pow",
        "reciprocal",
        "relu",
        "rsqrt",
        "sigmoid",
        "sqrt",
        "square",
        "sub",
    ),
    *("tanh", "log_softmax", "softmax"),
)

METHODS: dict[str, Rule] = {
    **{name: elementwise for method in _ENTRY_METHODS for name in (method, f"{method}_")},
    **dict.fromkeys(
        ("bfloat16", "clone", "contiguous", "detach", "double", "float", "half", "to"), elementwise
    ),
    **dict.fromkeys(("flatten", "ravel", "reshape", "unflatten", "view"), reshaped),
    **dict.fromkeys(
        ("movedim", "permute", "squeeze", "swapaxes", "t", "transpose", "unsqueeze"),
        viewed,
    ),
    **dict.fromkeys(("expand", "expand_as"), expanded),
    **dict.fromkeys(("amax", "amin", "logsumexp", "mean", "std", "sum", "var"), reduced),
    **dict.fromkeys(("dim", "numel", "size"), asked),
}
"""Methods of tensors."""

FUNCTIONS: dict[Callable[..., Any], Rule] = {
    **{getattr(torch, name): elementwise for name in _ENTRY_METHODS if hasattr(torch, name)},
    **dict.fromkeys(
        (
            operator.add,
            operator.sub,
            operator.mul,
            operator.truediv,
            operator.neg,
            operator.pow,
            *_IN_PLACE,
        ),
        elementwise,
    ),
    **dict.fromkeys(
        (
            F.alpha_dropout,
            F.celu,
            F.dropout,
            F.dropout2d,
            F.elu,
            F.gelu,
            F.hardsigmoid,
            F.hardswish,
            F.hardtanh,
        ),
        elementwise,
    ),
    **dict.fromkeys(
        (
            F.leaky_relu,
            F.log_softmax,
            F.logsigmoid,
            F.mish,
            F.normalize,
            F.relu,
            F.relu6,
            F.selu,
            F.sigmoid,
        ),
        elementwise,
    ),
    **dict.fromkeys(
        (F.silu, F.softmax, F.softplus, F.softsign, F.tanh, torch.where, torch.clone), elementwise
    ),
    **dict.fromkeys((torch.flatten, torch.ravel, torch.reshape, torch.unflatten), reshaped),
    **dict.fromkeys(
        (torch.movedim, torch.permute, torch.squeeze, torch.swapaxes, torch.t, torch.transpose),
        viewed,
    ),
    **dict.fromkeys((torch.unsqueeze, operator.getitem), viewed),
    **dict.fromkeys((torch.cat, torch.concat), concatenated),
    **dict.fromkeys(
        (torch.amax, torch.amin, torch.logsumexp, torch.mean, torch.std, torch.sum, torch.var),
        reduced,
    ),
    **dict.fromkeys(
        (F.adaptive_avg_pool1d, F.adaptive_max_pool1d, F.avg_pool1d, F.max_pool1d), pooled(1)
    ),
    **dict.fromkeys(
        (F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d), pooled(2)
    ),
    F.interpolate: _resized,
}
"""Functions and operators."""
