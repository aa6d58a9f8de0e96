"""The layers of a model that statistics describe, found in the same way on server and client."""

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.update import TRANSPOSED, tensor_names
from fedbasin.strategies.fusion.weighting import Statistic

# Most inputs or outputs of a layer with Kronecker factors: a square matrix of 4096 float64 takes 128 MiB.
MOST_WIDE = 4096


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies its inputs with a weight, and may add a bias.

    Attributes:
        block: names of its tensors, the weight first; a weight stored as `[in, out]` has the suffix `TRANSPOSED`.
        inputs: number of inputs of one output, a one for the bias included.
        outputs: number of outputs of all groups together.
        groups: number of groups of a convolution.
    """

    block: Block
    inputs: int
    outputs: int
    groups: int = 1


def gram_layers(model: nn.Module) -> list[Layer]:
    """Return the layers that are determined by a Gram matrix of their inputs, in the order of their modules.

    These are linear layers, two-dimensional convolutions and the joint projection of `nn.MultiheadAttention`. A layer
    is left out if another kind of module uses the same weight, as an embedding that is tied to the head.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # For each parameter the pairs that modules multiply with; an empty pair stands for any other use.
    uses: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
    for module in model.modules():
        pair_of = {id(t): tuple(map(id, pair)) for pair in _products(module) for t in pair}
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)].add(pair_of.get(id(parameter), ()))
    layers = [
        _layer(module, pair, names)
        for module in model.modules()
        for pair in _products(module)
        if all(uses[id(tensor)] == {tuple(map(id, pair))} for tensor in pair)
    ]
    # Two modules that share one weight are one layer.
    return list({layer.block: layer for layer in layers}.values())


def kronecker_layers(model: nn.Module) -> list[Layer]:
    """Return the trainable layers of `gram_layers` whose two Kronecker factors are small enough to store."""
    return [
        layer
        for layer in gram_layers(model)
        if layer.groups == 1
        and layer.block == tensor_names(layer.block)
        and max(layer.inputs, layer.outputs) <= MOST_WIDE
        and model.get_parameter(layer.block[0]).requires_grad
    ]


def known_blocks(model: nn.Module, statistic: Statistic) -> list[Block]:
    """Return the blocks for which every client must send a statistic."""
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
    """Yield each weight that the module multiplies its inputs with, together with its bias."""
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
    """Return True for GPT-2's linear layer, whose weight `transformers` stores as `[in, out]`."""
    # Looked up and not imported: transformers is optional and slow, and a model with such a layer has imported it.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)
