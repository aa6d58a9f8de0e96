"""Rules for the attention layers of plain torch: `nn.MultiheadAttention` and the layers and stacks of `nn.Transformer`.

    heads:   O(d)*O(d) wr S(h), where queries and keys rotate together, and values against the output projection
    units:   S(m) between the two Linears of a layer
    stream:  united with the units that the layer reads, because branches are added to it

Tracing sees such a layer as one operation. A fused `in_proj_weight` reads queries, keys and values with one axis, so
their sources are one space, in cross attention too. Keys that a layer adds itself (`bias_k`, zeros) have no key bias:
the key bias then counts in matching, and values cannot be shifted.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fedbasin.strategies.symmetry.discover.operations import (
    FUNCTIONS,
    PLAIN_MODULES,
    Feature,
    ModuleRule,
    Walk,
    elementwise,
    shape,
)
from fedbasin.strategies.symmetry.discover.units import Units
from fedbasin.strategies.symmetry.groups.groups import Orthogonal, Wreath
from fedbasin.strategies.symmetry.symmetry import Axis, Space
from fedbasin.strategies.symmetry.translation import Output, Shift


def _attention(walk: Walk, node: fx.Node, module: nn.MultiheadAttention) -> Feature:
    sources = _sources(walk, node, module, "query", "key", "value")
    spaces = (_units_of(walk, source) for source in sources)
    outputs = _follow_attention(walk, str(node.target), module, *spaces)
    if not _arguments(node, module).get("average_attn_weights", True):
        # Weights for each head are returned, which shows the order of the heads.
        walk.table.bind(f"{node.target}.out_proj.weight", 1, walk.fixed)
    return _feature(outputs, sources[0])


def _encoder_layer(walk: Walk, node: fx.Node, module: nn.TransformerEncoderLayer) -> Feature:
    (source,) = _sources(walk, node, module, "src")
    return _feature(_encoded(walk, str(node.target), module, _units_of(walk, source)), source)


def _encoder(walk: Walk, node: fx.Node, module: nn.TransformerEncoder) -> Feature:
    (source,) = _sources(walk, node, module, "src")
    return _feature(_encoders(walk, str(node.target), module, _units_of(walk, source)), source)


def _decoder_layer(walk: Walk, node: fx.Node, module: nn.TransformerDecoderLayer) -> Feature:
    source, memory = _sources(walk, node, module, "tgt", "memory")
    spaces = _units_of(walk, source), _units_of(walk, memory)
    return _feature(_decoded(walk, str(node.target), module, *spaces), source)


def _decoder(walk: Walk, node: fx.Node, module: nn.TransformerDecoder) -> Feature:
    source, memory = _sources(walk, node, module, "tgt", "memory")
    spaces = _units_of(walk, source), _units_of(walk, memory)
    return _feature(_decoders(walk, str(node.target), module, *spaces), source)


def _transformer(walk: Walk, node: fx.Node, module: Any) -> Feature:
    source, target = _sources(walk, node, module, "src", "tgt")
    name = str(node.target)
    memory = _encoders(walk, f"{name}.encoder", module.encoder, _units_of(walk, source))
    stream = _decoders(walk, f"{name}.decoder", module.decoder, _units_of(walk, target), memory)
    return _feature(stream, target)


LAYERS: dict[type[nn.Module], ModuleRule] = {
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerDecoderLayer: _decoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoder: _decoder,
    nn.Transformer: _transformer,
}
"""The rules of modules that contain attention."""

_KNOWN = (*LAYERS, nn.Linear, nn.LayerNorm, nn.Dropout, nn.ModuleList)


def is_plain(module: nn.Module) -> bool:
    """Return whether a layer has only the submodules that its class creates, all of them torch's own."""
    return all(
        (isinstance(part, _KNOWN) or type(part) in PLAIN_MODULES)
        and type(part).__module__.startswith("torch.nn.modules.")
        for part in module.modules()
    )


def _arguments(node: fx.Node, module: nn.Module) -> dict[str, Any]:
    return inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments


def _sources(walk: Walk, node: fx.Node, module: nn.Module, *names: str) -> list[fx.Node]:
    """Return the values that a layer reads, and fix the units of all other inputs, such as a computed mask."""
    arguments = _arguments(node, module)
    sources = [arguments[name] for name in names]
    for value in node.all_input_nodes:
        if value in walk.features and value not in sources:
            walk.table.fix(walk.features[value].units)
    return sources


def _units_of(walk: Walk, value: fx.Node) -> Units:
    """Return the units along the last axis of a value."""
    feature = walk.features.get(value)
    if feature is None:
        return walk.fixed
    if feature.axis != len(shape(value) or ()) - 1:
        walk.table.fix(feature.units)
        return walk.fixed
    return feature.units


def _feature(units: Units, like: fx.Node) -> Feature:
    return Feature(units, len(shape(like) or ()) - 1)


def _encoders(walk: Walk, name: str, stack: nn.TransformerEncoder, stream: Units) -> Units:
    for number, layer in enumerate(stack.layers):
        stream = _encoded(walk, f"{name}.layers.{number}", layer, stream)
    return _final_norm(walk, name, stack, stream)


def _decoders(walk: Walk, name: str, stack: nn.TransformerDecoder, stream: Units, memory: Units) -> Units:
    for number, layer in enumerate(stack.layers):
        stream = _decoded(walk, f"{name}.layers.{number}", layer, stream, memory)
    return _final_norm(walk, name, stack, stream)


def _final_norm(walk: Walk, name: str, stack: Any, stream: Units) -> Units:
    if stack.norm is not None:
        _bind(walk, f"{name}.norm", 0, stream)
    return stream


def _encoded(walk: Walk, name: str, layer: Any, stream: Units) -> Units:
    stream = _self_attention(walk, name, layer, stream)
    return _follow_units(walk, name, layer, stream, norms=2)


def _decoded(walk: Walk, name: str, layer: Any, stream: Units, memory: Units) -> Units:
    stream = _self_attention(walk, name, layer, stream)
    cross = layer.multihead_attn
    outputs = _follow_attention(walk, f"{name}.multihead_attn", cross, stream, memory, memory)
    return _follow_units(walk, name, layer, walk.table.unite(stream, outputs), norms=3)


def _self_attention(walk: Walk, name: str, layer: Any, stream: Units) -> Units:
    name = f"{name}.self_attn"
    outputs = _follow_attention(walk, name, layer.self_attn, stream, stream, stream)
    return walk.table.unite(stream, outputs)


def _follow_units(walk: Walk, name: str, layer: Any, stream: Units, *, norms: int) -> Units:
    """Follow the norms of a layer and its two Linears."""
    for number in range(norms):
        _bind(walk, f"{name}.norm{number + 1}", 0, stream)
    up, down = f"{name}.linear1", f"{name}.linear2"
    hidden = walk.table.new(up, layer.linear1.out_features)
    _bind(walk, up, 0, hidden)
    walk.table.bind(f"{up}.weight", 1, stream)
    walk.table.bind(f"{down}.weight", 1, hidden)
    _bind(walk, down, 0, stream)
    if not _is_elementwise(layer.activation):
        walk.table.fix(hidden)
    return stream


def _is_elementwise(activation: Callable[..., Any]) -> bool:
    if isinstance(activation, nn.Module):
        return PLAIN_MODULES.get(type(activation)) is elementwise
    return FUNCTIONS.get(activation) is elementwise


def _bind(walk: Walk, layer: str, axis: int, units: Units) -> None:
    """Bind the weight and the bias, if there is one, of a layer that writes or scales units."""
    for parameter in (f"{layer}.weight", f"{layer}.bias"):
        if parameter in walk.table.aliases:
            walk.table.bind(parameter, axis, units)


def _follow_attention(
    walk: Walk, name: str, module: nn.MultiheadAttention, query: Units, key: Units, value: Units
) -> Units:
    """Bind all tensors of an attention; return the units that its output projection writes."""
    parts = _Parts(name, module)
    for (weight, _), units in zip(parts.projections, (query, key, value), strict=True):
        walk.table.bind(weight, 1, units)
    outputs = walk.table.new(f"{name}.out_proj", module.embed_dim)
    _bind(walk, f"{name}.out_proj", 0, outputs)
    # The heads are declared once, though the graphs for evaluation and training are both followed.
    if (f"{name}.out_proj.weight", 1) not in walk.table.bound:
        heads = walk.table.occupied(parts.space(), tuple(parts.shifts()))
        for axis in parts.axes():
            walk.table.bind(axis.tensor, axis.dim, heads)
    return outputs


@dataclass(frozen=True)
class _Parts:
    """The names of an attention's tensors, and the space of its heads."""

    name: str
    module: nn.MultiheadAttention

    @property
    def projections(self) -> list[tuple[str, tuple[int, int] | None]]:
        """The weights of query, key and value, each with its part of the tensor if they are fused."""
        if self.module.in_proj_weight is None:
            return [(f"{self.name}.{part}_proj_weight", None) for part in "qkv"]
        return [(f"{self.name}.in_proj_weight", third) for third in self._thirds]

    @property
    def adds_keys(self) -> bool:
        """True if there are keys besides those that are projected."""
        return self.module.bias_k is not None or self.module.add_zero_attn

    def space(self) -> Space:
        size, count = self.module.head_dim, self.module.num_heads
        group = Wreath((Orthogonal(size), Orthogonal(size)), count)
        return Space(f"{self.name}.heads", group, tuple(self.axes()))

    def axes(self) -> Iterator[Axis]:
        for (weight, part), role in zip(self.projections, (0, 0, 1), strict=True):
            yield Axis(weight, 0, part, role)
        if self.module.in_proj_bias is not None:
            for number, third in enumerate(self._thirds):
                scored = number != 1 or self.adds_keys
                yield Axis(f"{self.name}.in_proj_bias", 0, third, number // 2, scored)
        if self.module.bias_k is not None:
            yield Axis(f"{self.name}.bias_k", 2)
            yield Axis(f"{self.name}.bias_v", 2, role=1)
        yield Axis(f"{self.name}.out_proj.weight", 1, role=1)

    def shifts(self) -> Iterator[Shift]:
        if self.module.in_proj_bias is not None and not self.adds_keys:
            _, key, value = self._thirds
            bias, output = f"{self.name}.in_proj_bias", f"{self.name}.out_proj"
            yield Shift(bias, key)
            yield Shift(bias, value, output=Output(f"{output}.weight", 1, f"{output}.bias"))

    @property
    def _thirds(self) -> list[tuple[int, int]]:
        width = self.module.embed_dim
        return [(number * width, (number + 1) * width) for number in range(3)]
