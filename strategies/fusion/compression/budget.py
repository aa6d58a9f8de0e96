"""The choice of forms for the layers' statistics, so that a client sends at most a number of bytes in a round.

Every layer starts in its exact form. While the sum is above the budget, the statistic with the most bytes goes to its
next cheaper form. The sequence does not depend on the budget, so more bytes never give a worse form.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import inf
from typing import TypeVar

from fedbasin.proto.encoding import Encoding, GramForm, GramKind, MomentKind
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.compression.formats import cross_moment_layout, layout
from fedbasin.strategies.fusion.layers import Layer

# Inputs per row of a sketch, from fine to coarse, and size of the blocks of a block diagonal.
_SKETCHES = (16, 32)
_BLOCK = 8

T = TypeVar("T")


class BudgetError(ValueError):
    """A budget that is smaller than the cheapest forms of all layers."""


def choose(
    layers: Sequence[Layer], budget: int, *, cross_moments: bool, sketches: bool = True
) -> dict[Block, Encoding]:
    """Choose the encoding of each layer's statistics.

    Args:
        layers: layers with statistics in one round.
        budget: bytes of all values together; 0 for no bound.
        cross_moments: True if clients also send cross-moments, as for layers that are refitted.
        sketches: True if sketches are allowed; they have no off-diagonal to shrink.

    Raises:
        BudgetError: the cheapest forms need more; the message gives their bytes and the largest layer.
    """
    chosen = {layer.block: Encoding(inputs=layer.inputs, groups=layer.groups) for layer in layers}
    while budget and (total := spent(layers, chosen, cross_moments=cross_moments)) > budget:
        steps = [
            (bytes_now, layer, encoding)
            for layer in layers
            for bytes_now, encoding in _steps(
                layer, chosen[layer.block], cross_moments=cross_moments, sketches=sketches
            )
        ]
        if not steps:
            largest = max(layers, key=lambda layer: spent([layer], chosen, cross_moments=True))
            raise BudgetError(
                f"statistics-budget-bytes = {budget}, and the cheapest forms of {len(layers)} layers take {total}, "
                f"most of it for {largest.block[0]}; set at least {total}, or choose the recipe fedavg, which sends "
                "no statistics"
            )
        _, layer, encoding = max(steps, key=lambda step: step[0])
        chosen[layer.block] = encoding
    return chosen


def spent(layers: Sequence[Layer], chosen: Mapping[Block, Encoding], *, cross_moments: bool) -> int:
    """Return the bytes of all layers' statistics, without the arrays' headers."""
    return sum(
        _gram_bytes(layer, chosen[layer.block].gram) + cross_moments * _moment_bytes(layer, chosen[layer.block].moment)
        for layer in layers
    )


def _steps(layer: Layer, now: Encoding, *, cross_moments: bool, sketches: bool) -> Iterator[tuple[int, Encoding]]:
    """Yield the next cheaper encodings, for Gram matrix and cross-moment, each with the bytes of the present form."""
    for form, cheaper in pairwise(_gram_ladder(layer, sketches=sketches)):
        if form == now.gram:
            yield _gram_bytes(layer, form), replace(now, gram=cheaper)
    for kind, smaller in pairwise(_moment_ladder(layer) if cross_moments else []):
        if kind is now.moment:
            yield _moment_bytes(layer, kind), replace(now, moment=smaller)


def _gram_ladder(layer: Layer, *, sketches: bool) -> list[GramForm]:
    """Return the forms of a Gram matrix, from the best to the cheapest."""
    forms = [
        GramForm(),
        GramForm(GramKind.half),
        GramForm(GramKind.byte),
        *(GramForm(GramKind.sketch, max(1, layer.inputs // n)) for n in _SKETCHES * sketches),
        GramForm(GramKind.blocks, _BLOCK),
        GramForm(GramKind.diagonal),
    ]
    return _descending(forms, [_gram_bytes(layer, form) for form in forms])


def _moment_ladder(layer: Layer) -> list[MomentKind]:
    """Return the forms of a cross-moment, from the best to the cheapest."""
    return _descending(list(MomentKind), [_moment_bytes(layer, kind) for kind in MomentKind])


def _descending(forms: Sequence[T], costs: Sequence[int]) -> list[T]:
    """Return the forms that cost less than every better one."""
    # In small layers a sketch can take more bytes than the exact form.
    least = [inf, *accumulate(costs, min)]
    return [form for form, cost, low in zip(forms, costs, least, strict=False) if cost < low]


def _gram_bytes(layer: Layer, form: GramForm) -> int:
    pieces = layout(form, layer.inputs, len(layer.block) > 1)
    return layer.groups * sum(piece.nbytes for piece in pieces.values())


def _moment_bytes(layer: Layer, kind: MomentKind) -> int:
    pieces = cross_moment_layout(kind, layer.outputs, layer.inputs)
    return sum(piece.nbytes for piece in pieces.values())
