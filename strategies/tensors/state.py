"""The state of a model: its tensors by name, as `torch.nn.Module.state_dict` gives them."""

import math
from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = Mapping[str, Tensor]

# Names that torch's normalisation layers give to statistics, which are measured and not learned.
MEASURED = ("running_mean", "running_var")

# Elements of a piece of a tensor: 1 MiB of float32, which stays in the cache.
_PIECE = 2**18


def floating(state: State) -> dict[str, Tensor]:
    """Return the tensors that can be averaged, which leaves out counters and indices."""
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def tied(state: State) -> dict[str, str]:
    """Return for each name the first name of the same tensor, as for embeddings that are tied to the head.

    Args:
        state: state of the model itself, because copies of its tensors do not share memory.
    """
    first_names: dict[tuple[object, ...], str] = {}
    return {
        # An empty tensor has no memory to share.
        name: first_names.setdefault((t.data_ptr(), t.shape, t.stride()), name) if t.numel() else name
        for name, t in state.items()
    }


def added_prefix(names: Collection[str], wanted: Collection[str]) -> str:
    """Return what stands before every wanted name among other names; empty where nothing does.

    `DataParallel` and `torch.compile` put such a prefix before the names of the module that they wrap.
    """
    first = next(iter(wanted), "")
    prefixes = sorted(name.removesuffix(first) for name in names if name.endswith(f".{first}"))
    return next((prefix for prefix in prefixes if all(f"{prefix}{name}" in names for name in wanted)), "")


def distance(a: State, b: State) -> float:
    """Return the Euclidean distance of the floating tensors whose names `a` and `b` share."""
    return math.hypot(
        *(
            # In double, because a half-precision norm overflows at 65504.
            float(torch.linalg.vector_norm(x - y, dtype=torch.float64))
            for name, tensor in floating(a).items()
            if name in b
            for x, y in zip(_pieces(tensor), _pieces(b[name]), strict=True)
        )
    )


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the tensor in pieces whose difference stays in the cache."""
    return tensor.reshape(-1).split(_PIECE)


def extrapolate(a: State, b: State, t: float) -> dict[str, Tensor]:
    """Return the point `(1 - t) a + t b` for any t, also beyond `b`.

    Running statistics are those of `b`, because an extrapolated variance can be negative.
    """
    point = interpolate(a, b, t)
    return {name: tensor if name.endswith(MEASURED) else point[name] for name, tensor in b.items()}


def continued(model: State, here: State, before: State) -> dict[str, Tensor]:
    """Return `model + here - before`; running statistics, and tensors that are not floating, are those of `model`."""
    moved = {
        name: (tensor.double() + (here[name].double() - before[name].double()).nan_to_num(0.0)).to(tensor.dtype)
        for name, tensor in floating(model).items()
        if not name.endswith(MEASURED)
    }
    return {**model, **moved}


def interpolate(a: State, b: State, t: float) -> dict[str, Tensor]:
    """Return the point `(1 - t) a + t b`; tensors that are not floating are those of `b`."""
    return {name: _lerp(a[name], tensor, t) if tensor.is_floating_point() else tensor for name, tensor in b.items()}


def _lerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    # lerp is exact at both ends, where `(1 - t) a + t b` rounds.
    point = torch.lerp(a, b, t)
    # Entries that are infinite in both, as in a mask, have a difference that is no number.
    return point if not point.isnan().any() else torch.where(a == b, b, point)
