"""Which blocks of a model a statistic speaks of: read from its modules, the same on server and client."""

from collections import defaultdict
from typing import TypeAlias, TypeGuard

from torch import nn

from fedbasin.strategies.fusion.update import Block
from fedbasin.strategies.recipe import Statistic

Layer: TypeAlias = nn.Linear | nn.Conv2d


def gram_layers(model: nn.Module) -> dict[Layer, Block]:
    """The layers whose weights a Gram matrix describes completely, with the names of their tensors.

    Linear layers and ungrouped two-dimensional convolutions, unless another kind of module multiplies with
    the same weight (an embedding tied to the head).
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    uses: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)].add(_tensors(module))
    return {
        module: tuple(names[tensor] for tensor in _tensors(module))
        for module in model.modules()
        if _is_layer(module) and all(uses[t] == {_tensors(module)} for t in _tensors(module))
    }


def known_blocks(model: nn.Module, statistic: Statistic) -> list[Block]:
    """The blocks that every client must send a statistic of."""
    match statistic:
        case Statistic.none:
            return []
        case Statistic.fisher:
            return [(name,) for name, p in model.named_parameters() if p.requires_grad]
        case Statistic.gram:
            return list(dict.fromkeys(gram_layers(model).values()))


def _is_layer(module: nn.Module) -> TypeGuard[Layer]:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _tensors(module: nn.Module) -> tuple[int, ...]:
    """Which tensors a layer multiplies its inputs with; none for modules that have no Gram."""
    if not _is_layer(module):
        return ()
    return tuple(id(tensor) for tensor in (module.weight, module.bias) if tensor is not None)
