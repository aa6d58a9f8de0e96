"""Layers of a model by the names of its tensors: the first number in a name is that of its layer."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_LAYER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")

# Tensors outside the layers that come before them; all others come behind.
_EMBEDDING = re.compile(r"emb|wte|wpe|shared")


class LayerName(NamedTuple):
    """A tensor's name around its layer's number: `model.layers.`, 3, `.mlp.up_proj.weight`."""

    stack: str
    layer: int
    rest: str


def layer_of(name: str) -> LayerName | None:
    """Return the parts of a tensor's name; None for a tensor outside the layers."""
    number = _LAYER.search(name)
    return LayerName(name[: number.start()], int(number[0]), name[number.end() :]) if number else None


def layer_counts(names: Iterable[str]) -> Mapping[str, int]:
    """Return the number of layers of each stack."""
    counts: defaultdict[str, int] = defaultdict(int)
    for parts in map(layer_of, names):
        if parts is not None:
            counts[parts.stack] = max(counts[parts.stack], parts.layer + 1)
    return counts


def depth_of(name: str, counts: Mapping[str, int]) -> float:
    """Return the position of a tensor's layer in its stack, 0 to 1; 0 outside the layers, 1 for the only one."""
    parts = layer_of(name)
    return 0.0 if parts is None else fraction(parts.layer, counts[parts.stack])


def fraction(layer: int, layers: int) -> float:
    """Return the position of a layer among some layers, 0 to 1."""
    return layer / (layers - 1) if layers > 1 else 1.0


def is_embedding(name: str) -> bool:
    """Return True if a tensor outside the layers comes before them."""
    return _EMBEDDING.search(name) is not None
