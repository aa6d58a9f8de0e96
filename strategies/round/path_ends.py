"""The ends of a path among the models of one round."""

import torch
from torch import Tensor

from fedbasin.proto.request import PathSpec
from fedbasin.strategies.tensors.state import State, extrapolate, interpolate


def path_ends(
    spec: PathSpec, start: State, fused: State, refitted: State
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the two models between which a path runs.

    Args:
        spec: the path.
        start: the global model that the round began with.
        fused: the model that the clients' models were fused to.
        refitted: that model with layers fitted.
    """
    through = interpolate(fused, refitted, spec.mix)
    if spec.extrapolate:
        first, last = (extrapolate(start, through, length) for length in (0.0, spec.extrapolate))
    else:
        first, last = dict(fused), through
    if spec.scaled is not None:
        first = {**last, **{name: torch.zeros_like(last[name]) for name in spec.scaled}}
    return first, last
