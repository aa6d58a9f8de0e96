"""Which blocks of a model a statistic speaks of: read from its modules, the same on server and client."""

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.update import TRANSPOSED, stored
from fedbasin.strategies.recipes import Statistic

# Inputs or outputs of which second moments are kept on both sides: a square of 4096 float64 is 128 MiB.
MOST_WIDE = 4096


@dataclass(frozen=True)
class Layer:
    """A weight that is multiplied with inputs, alone or with its bias.

    Attributes:
        block: the names of its tensors, the weight first; `TRANSPOSED` behind one that is stored as `[in, out]`.
        inputs: numbers that one output is computed from, a one for the bias included.
        outputs: of all groups together.
        groups: parts of a convolution that read channels of their own.
    """

    block: Block
    inputs: int
    outputs: int
    groups: int = 1


def gram_layers(model: nn.Module) -> list[Layer]:
    """The layers whose weights a Gram matrix describes completely, in the order of their modules.

    Linear layers, two-dimensional convolutions and the joint projection of `nn.MultiheadAttention`, unless
    another kind of module multiplies with the same weight (an embedding tied to the head).
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    uses: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
    for module in model.modules():
        known = {id(t): tuple(map(id, pair)) for pair in _products(module) for t in pair}
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)].add(known.get(id(parameter), ()))
    layers = [
        _layer(module, pair, names)
        for module in model.modules()
        for pair in _products(module)
        if all(uses[id(tensor)] == {tuple(map(id, pair))} for tensor in pair)
    ]
    return list({layer.block: layer for layer in layers}.values())


def kronecker_layers(model: nn.Module) -> list[Layer]:
    """Those of them that are trained and whose curvature has two factors of a size that can be kept."""
    return [
        layer
        for layer in gram_layers(model)
        if layer.groups == 1
        and layer.block == stored(layer.block)
        and max(layer.inputs, layer.outputs) <= MOST_WIDE
        and model.get_parameter(layer.block[0]).requires_grad
    ]


def known_blocks(model: nn.Module, statistic: Statistic) -> list[Block]:
    """The blocks that every client must send a statistic of."""
    match statistic:
        case Statistic.none:
            return []
        case Statistic.fisher:
            return [(name,) for name, p in model.named_parameters() if p.requires_grad]
        case Statistic.gram:
            return [layer.block for layer in gram_layers(model)]
        case Statistic.kronecker:
            return [layer.block for layer in kronecker_layers(model)]


def _products(module: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """The weights that a module multiplies its inputs with, each with its bias."""
    pair: tuple[Tensor | None, Tensor | None]
    match module:
        case _ if _is_transposed(module):
            pair = module.get_parameter("weight"), module.get_parameter("bias")
        case nn.Linear() | nn.Conv2d():
            pair = module.weight, module.bias
        case nn.MultiheadAttention():
            pair = module.in_proj_weight, module.in_proj_bias
        case _:
            return
    present = tuple(tensor for tensor in pair if tensor is not None)
    if pair[0] is not None:
        yield present


def _layer(module: nn.Module, pair: tuple[Tensor, ...], names: dict[int, str]) -> Layer:
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    block = tuple(names[id(tensor)] for tensor in pair)
    weight = pair[0]
    if _is_transposed(module):
        block, weight = (block[0] + TRANSPOSED, *block[1:]), weight.T
    return Layer(block, weight[0].numel() + len(pair) - 1, len(weight), groups)


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, which `transformers` stores as `[in, out]`."""
    # Where a model has one, its module has been imported; it is not for this.
    known = sys.modules.get("transformers.pytorch_utils")
    return known is not None and isinstance(module, known.Conv1D)
