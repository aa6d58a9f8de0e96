"""The rules of layers with parameters, by which tracing binds the axes of their tensors to units."""

from collections.abc import Iterable

from torch import fx, nn

from fedbasin.strategies.symmetry.discover.operations import Feature, ModuleRule, Walk, dims, elementwise, source


def _linear(walk: Walk, node: fx.Node, module: nn.Linear) -> Feature:
    last = dims(node) - 1
    walk.bind(node, ("weight",), 1, walk.units_read(node, last))
    units = walk.write(node, module.out_features, 0)
    walk.bind(node, ("bias",), 0, units)
    return Feature(units, last)


def _convolution(walk: Walk, node: fx.Node, module: nn.Conv2d) -> Feature | None:
    channels = dims(node) - module.weight.dim() + 1
    if module.groups == 1:
        walk.bind(node, ("weight",), 1, walk.units_read(node, channels))
        units = walk.write(node, module.out_channels, 0)
        walk.bind(node, ("bias",), 0, units)
        return Feature(units, channels)
    # Output channels belong to a group of input channels, so groups move as wholes: single channels if depthwise.
    walk.bind(node, ("weight",), 1, walk.fixed)
    units = walk.units_read(node, channels)
    if units is not walk.fixed:
        walk.table.move_runs(units, module.groups)
    return _scale(walk, node, channels, ("weight", "bias"))


def _scale(walk: Walk, node: fx.Node, axis: int, names: Iterable[str]) -> Feature | None:
    units = walk.units_read(node, axis)
    walk.bind(node, names, 0, units)
    return None if units is walk.fixed else Feature(units, axis)


def _batch_norm(walk: Walk, node: fx.Node, module: nn.BatchNorm2d) -> Feature | None:  # noqa: ARG001
    return _scale(walk, node, 1, ("weight", "bias", "running_mean", "running_var"))


def _group_norm(walk: Walk, node: fx.Node, module: nn.GroupNorm) -> Feature | None:
    units = walk.units_read(node, 1)
    if 1 < module.num_groups < module.num_channels:
        if units.width == module.num_channels:
            walk.table.keep_groups(units, module.num_groups)
        else:
            walk.table.fix(units)
    return _scale(walk, node, 1, ("weight", "bias"))


def _layer_norm(walk: Walk, node: fx.Node, module: nn.LayerNorm | nn.RMSNorm) -> Feature | None:
    feature = walk.features.get(source(node))
    offset = dims(node) - len(module.normalized_shape)
    for axis in range(len(module.normalized_shape)):
        carries_units = feature is not None and feature.axis == offset + axis
        units = feature.units if feature is not None and carries_units else walk.fixed
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
    if module.max_norm is not None:  # the forward pass then writes to the table
        walk.bind(node, ("weight",), 1, walk.fixed)
        return None
    return Feature(walk.write(node, module.embedding_dim, 1), dims(node) - 1)


MODULES: dict[type[nn.Module], ModuleRule] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
}
"""The rules of modules with parameters."""
