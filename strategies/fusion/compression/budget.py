"""How many bytes of statistics a client may send in a round, and what is then sent of each layer.

Every layer begins with what is exact. While that is too much, whichever costs most goes one step down. The
steps do not depend on the budget, which only says where to stop: more bytes never give a worse form.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import inf
from typing import TypeVar

from fedbasin.proto.encoding import Encoding, GramForm, GramKind, MomentKind
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.compression.formats import layout, moment_layout
from fedbasin.strategies.fusion.layers import Layer

# Inputs for each row of a sketch, from the finer one to the coarser.
_SKETCHES = (16, 32)
_BLOCK = 8

T = TypeVar("T")


class BudgetError(ValueError):
    """Not even the cheapest forms fit."""


def choose(
    layers: Sequence[Layer], budget: int, *, moments: bool, sketches: bool = True
) -> dict[Block, Encoding]:
    """What is sent of each layer.

    Args:
        layers: those that clients say something of in one round.
        budget: bytes of all values together; 0 for no bound.
        moments: whether they also send what the layers are fitted to.
        sketches: whether a sketch will do; it has no off-diagonal that could be shrunk.

    Raises:
        BudgetError: it is less than the cheapest forms take; names that and the largest layer.
    """
    chosen = {layer.block: Encoding(inputs=layer.inputs, groups=layer.groups) for layer in layers}
    while budget and (total := spent(layers, chosen, moments=moments)) > budget:
        steps = [
            (bytes_now, layer, encoding)
            for layer in layers
            for bytes_now, encoding in _steps(
                layer, chosen[layer.block], moments=moments, sketches=sketches
            )
        ]
        if not steps:
            raise _too_small(layers, chosen, budget, total)
        _, layer, encoding = max(steps, key=lambda step: step[0])
        chosen[layer.block] = encoding
    return chosen


def spent(layers: Sequence[Layer], chosen: Mapping[Block, Encoding], *, moments: bool) -> int:
    """Bytes of all layers' statistics; the arrays' headers come on top."""
    return sum(
        _gram_bytes(layer, chosen[layer.block].gram)
        + moments * _moment_bytes(layer, chosen[layer.block].moment)
        for layer in layers
    )


def _steps(
    layer: Layer, now: Encoding, *, moments: bool, sketches: bool
) -> Iterator[tuple[int, Encoding]]:
    """One step down for the Gram matrix, one for the moment, each with the bytes that it would lower."""
    for form, cheaper in pairwise(_gram_ladder(layer, sketches=sketches)):
        if form == now.gram:
            yield _gram_bytes(layer, form), replace(now, gram=cheaper)
    for kind, smaller in pairwise(_moment_ladder(layer) if moments else []):
        if kind is now.moment:
            yield _moment_bytes(layer, kind), replace(now, moment=smaller)


def _gram_ladder(layer: Layer, *, sketches: bool) -> list[GramForm]:
    """The forms of a Gram matrix, from the best."""
    rows = [
        GramForm(GramKind.sketch, max(1, layer.inputs // each)) for each in _SKETCHES * sketches
    ]
    rounded, parts = (
        [GramForm(GramKind.half), GramForm(GramKind.byte)],
        [GramForm(GramKind.blocks, _BLOCK)],
    )
    forms = [GramForm(), *rounded, *rows, *parts, GramForm(GramKind.diagonal)]
    return _descending(forms, [_gram_bytes(layer, form) for form in forms])


def _moment_ladder(layer: Layer) -> list[MomentKind]:
    """The forms of a moment, from the best."""
    return _descending(list(MomentKind), [_moment_bytes(layer, kind) for kind in MomentKind])


def _descending(forms: Sequence[T], costs: Sequence[int]) -> list[T]:
    """Those that cost less than all before them."""
    least = [inf, *accumulate(costs, min)]
    return [form for form, cost, low in zip(forms, costs, least, strict=False) if cost < low]


def _gram_bytes(layer: Layer, form: GramForm) -> int:
    pieces = layout(form, layer.inputs, len(layer.block) > 1)
    return layer.groups * sum(piece.nbytes for piece in pieces.values())


def _moment_bytes(layer: Layer, kind: MomentKind) -> int:
    pieces = moment_layout(kind, layer.outputs, layer.inputs)
    return sum(piece.nbytes for piece in pieces.values())


def _too_small(
    layers: Sequence[Layer], chosen: Mapping[Block, Encoding], budget: int, least: int
) -> BudgetError:
    most = max(layers, key=lambda layer: spent([layer], chosen, moments=True))
    return BudgetError(
        f"statistics-budget-bytes = {budget}, and the cheapest forms of {len(layers)} layers take {least}, most of it "
        f"for {most.block[0]}; set at least {least}, or choose the recipe fedavg, which sends no statistics"
    )
