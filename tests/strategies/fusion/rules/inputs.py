"""Tensors to merge, and the call of a rule by name as the command makes it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedbasin.strategies.fusion.rules.merging_rules import ARGUMENTS, RULES

SHAPES = ((7, 5), (11,), (3, 2, 2), (1, 1), (600, 500))


def fine_tuned(
    shape: tuple[int, ...] = (7, 5), count: int = 3, spread: float = 0.1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor]]:
    """Return an anchor, and models near it."""
    generator = torch.Generator().manual_seed(len(shape) + count)
    anchor = torch.randn(shape, generator=generator, dtype=torch.float64)
    models = [anchor + spread * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return anchor.to(dtype), [model.to(dtype) for model in models]


def merge(
    name: str, anchor: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float] = (), **parameters: Any
) -> Tensor:
    """Call a rule of the catalogue with its defaults; a per-model parameter may be one number."""
    rule = RULES[name]
    assert parameters.keys() <= rule.parameters
    arguments = {ARGUMENTS.get(key, key): parameters.get(key, value) for key, value in rule.shared.items()}
    for key, default in rule.per_model.items():
        value = parameters.get(key, default)
        arguments[key] = list(value) if isinstance(value, Sequence) else [value] * len(tensors)
    if rule.random:
        arguments["seeds"] = list(range(len(tensors)))
    return rule.function(anchor, tensors, list(weights) or [1.0] * len(tensors), **arguments)
