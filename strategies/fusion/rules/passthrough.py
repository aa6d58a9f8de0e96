"""One model's tensor as it is, or times a number: for stacks of layers from several models (slices)."""

from collections.abc import Sequence

from torch import Tensor

from fedbasin.strategies.fusion.rules.span import combine


def passthrough(
    _anchor: Tensor | None, tensors: Sequence[Tensor], _weights: Sequence[float], *, scale: Sequence[float]
) -> Tensor:
    """Return the only tensor times its scale; a scale of 1 keeps its bits."""
    return tensors[0] if scale[0] == 1 else combine(None, tensors, scale)
