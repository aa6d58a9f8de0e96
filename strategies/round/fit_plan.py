"""The plan of a round's closed-form fits: which layers are fitted in which stage, and what a model has no layers for."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from math import prod
from typing import Literal

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block, LayerGraph
from fedbasin.proto.request import Refit
from fedbasin.strategies.analytic.deep_analytic import count_blocks
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import Evidence
from fedbasin.strategies.fusion.head_memory import HeadMemory
from fedbasin.strategies.fusion.update import weight_of
from fedbasin.strategies.recipes import BlockRefit, ClosedForm, HeadRefit, LayerRefit, Target
from fedbasin.strategies.round.refit import RefitBlock, RefitHead, RefitLayers
from fedbasin.strategies.round.stage import Accumulate, Stage
from fedbasin.strategies.tensors.state import State

Grouping = Literal["layer", "block"]
# Inputs of a last layer that is solved for unasked: their second moments take 128 MiB of a client's memory.
_WIDEST_HEAD = 4096
# Bytes of a number in them.
_BYTES = 4
# Bytes of sums that a client sends of layers that are fitted unasked, without those that several layers share.
_MOST_SUMS = 2**27


def left_out(refit: ClosedForm, layer_graph: LayerGraph | None, model: State) -> str:
    """Return what a model has no layers for; empty where all of a recipe's fit can be done.

    Args:
        refit: what the recipe fits.
        layer_graph: the layers of the clients' model.
        model: the model.
    """
    if refit.head and (layer_graph is None or layer_graph.head is None):
        return "a last layer that can be fitted to the targets of the task"
    if layer_graph and layer_graph.head and isinstance(refit, HeadRefit) and refit.probe:
        inputs = model[layer_graph.head[0]][0].numel()
        if inputs > _WIDEST_HEAD:
            return f"a last layer of at most {_WIDEST_HEAD} inputs (it has {inputs}); recipe = 'head' solves for wider ones"
    return "" if layer_graph and layer_graph.levels else "linear layers or convolutions"


def plan_refits(refit: ClosedForm, layer_graph: LayerGraph | None, grouping: Grouping, model: State) -> list[Refit]:
    """Return the layers that a recipe fits, stage by stage; none where the model has no such layers.

    Args:
        refit: what the recipe fits.
        layer_graph: the layers of the clients' model.
        grouping: whether layers are fitted one after the other, or a block of them at a time.
        model: the model, which tells how many blocks it has.
    """
    if layer_graph is None or not layer_graph.levels:
        return []
    stages: list[tuple[tuple[Block, ...], Target]] = []
    if isinstance(refit, LayerRefit):
        apart = {layer_graph.head} if refit.head else set()
        body = (tuple(b for b in level if b not in apart) for level in layer_graph.levels)
        levels = [level for level in body if level]
        groups = levels if grouping == "layer" else _by_block(levels)
        stages = [(group, refit.target) for group in groups]
    if refit.head and layer_graph.head is not None:
        # The sums of a last layer determine the block beside it, and those behind the last block but one the layer.
        count = count_blocks(model) if isinstance(refit, BlockRefit) else 1
        stages += count * [((layer_graph.head,), Target[layer_graph.head_target or Target.labels.name])]
    if not stages:
        return []
    requests = [Refit(blocks, target.name, index) for index, (blocks, target) in enumerate(stages)]
    # The output of the layers below is settled when the last layer is fitted.
    return [*requests[:-1], replace(requests[-1], norms=layer_graph.norms)]


def is_affordable(requests: Sequence[Refit], model: State) -> bool:
    """Return whether clients send at most 128 MiB of sums for some layers, as for a head that is solved for unasked."""
    return (
        _BYTES * sum(map(partial(_entries, model), (b for request in requests for b in request.blocks))) <= _MOST_SUMS
    )


def _entries(model: State, block: Block) -> int:
    """Return the number of entries of a layer's sums."""
    outputs, *rest = weight_of(block, model).shape
    inputs = prod(rest) + len(block) - 1
    return inputs * (inputs + outputs)


def _by_block(levels: Sequence[tuple[Block, ...]]) -> list[tuple[Block, ...]]:
    """Group levels: one stage from the second level of each block but the last on, one for each level outside.

    Only the first level of a stage reads what fused layers compute; the levels behind it read what the client's own
    model computes. Fusing weights disturbs attention most, so the level behind it comes first. What the last block
    leaves over, the head behind it corrects.
    """
    modules = _modules([level[0][0] for level in levels])
    runs = [list(run) for _, run in groupby(range(len(levels)), modules.__getitem__)]
    blocks = [run for run in runs if len(run) > 1]
    starts = {run[1] for run in blocks[:-1]} | {run[0] for run in runs if len(run) == 1}
    stages: list[tuple[Block, ...]] = [()]
    for index, level in enumerate(levels):
        stages = [*stages, level] if index in starts else [*stages[:-1], stages[-1] + level]
    return [stage for stage in stages if stage]


def _modules(names: Sequence[str]) -> list[str]:
    """Return for each level its innermost numbered module with more levels, as a transformer's block; else its name."""
    numbered = [[name[: match.end()] for match in re.finditer(r"\d+\.", name)] for name in names]
    counts = Counter(prefix for prefixes in numbered for prefix in prefixes)
    return [
        next((prefix for prefix in reversed(prefixes) if counts[prefix] > 1), name)
        for name, prefixes in zip(names, numbered, strict=True)
    ]


def refit_stage(
    refit: ClosedForm,
    model: State,
    request: Refit,
    encodings: Mapping[Block, Encoding] | None,
    accumulate: Accumulate,
    memory: HeadMemory | None = None,
    number: int = 0,
) -> Stage:
    """Return the stage of one of a recipe's fits.

    Args:
        refit: what the recipe fits.
        model: the model so far.
        request: the layers of this stage.
        encodings: encodings in which the sums are sent; None for exactly.
        accumulate: makes the accumulator of the stage.
        memory: the head's sums of earlier rounds; None for none.
        number: number of the round.
    """
    ridge, holds_out = refit.head or Evidence(), refit.probe is not None
    if isinstance(refit, BlockRefit) and request.sequence < count_blocks(model) - 1:
        return RefitBlock(model, request, ridge, encodings=encodings, accumulate=accumulate)
    if request.target == Target.labels.name:
        return RefitHead(
            model,
            request,
            ridge,
            encodings=encodings,
            accumulate=accumulate,
            holds_out=holds_out,
            memory=memory,
            number=number,
        )
    if request.target == Target.values.name:
        # The evidence needs the energy of the targets, which only labels tell.
        strength = ridge.strength if isinstance(ridge, Ridge) else ridge.otherwise
        return RefitLayers(model, request, strength, encodings=encodings, accumulate=accumulate, holds_out=holds_out)
    if not isinstance(refit, LayerRefit):
        raise TypeError(f"a fit of the head alone has no layers with the target {request.target}")
    return RefitLayers(
        model, request, refit.ridge, refit.fraction, encodings=encodings, accumulate=accumulate, holds_out=holds_out
    )
