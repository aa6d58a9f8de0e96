"""The state of a model: its tensors by name, as `torch.nn.Module.state_dict` gives them."""

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = Mapping[str, Tensor]

# As torch's normalisation layers call what they measure, and do not learn.
MEASURED = ("running_mean", "running_var")

_PIECE = 2**18  # elements


def floating(state: State) -> dict[str, Tensor]:
    """The tensors that can be averaged; counters and indices are left to the anchor."""
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def tied(state: State) -> dict[str, str]:
    """For each name the first name of the same tensor, where a model uses one under several names.

    Args:
        state: of a model itself, whose tensors still share their memory.
    """
    first: dict[tuple[object, ...], str] = {}
    return {
        # An empty tensor has no memory to share.
        name: first.setdefault((t.data_ptr(), t.shape, t.stride()), name) if t.numel() else name
        for name, t in state.items()
    }


def distance(a: State, b: State) -> float:
    """Euclidean distance of the floating tensors that `a` and `b` share."""
    return math.hypot(
        *(
            # Summed in double: a half-precision norm overflows at 65504.
            float(torch.linalg.vector_norm(ours - theirs, dtype=torch.float64))
            for name, tensor in floating(a).items()
            if name in b
            for ours, theirs in zip(_pieces(tensor), _pieces(b[name]), strict=True)
        )
    )


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """In parts whose difference stays in the cache."""
    return tensor.reshape(-1).split(_PIECE)


def beyond(a: State, b: State, t: float) -> dict[str, Tensor]:
    """The point `(1 - t) a + t b` of the parameters, where t may be more than 1.

    Running statistics are taken from `b`: beyond it a variance might be negative.
    """
    moved = interpolate(a, b, t)
    return {name: tensor if name.endswith(MEASURED) else moved[name] for name, tensor in b.items()}


def interpolate(a: State, b: State, t: float) -> dict[str, Tensor]:
    """The point `(1 - t) a + t b`; tensors that are not floating come from `b`."""
    return {
        name: torch.lerp(a[name], tensor, t) if tensor.is_floating_point() else tensor
        for name, tensor in b.items()
    }
