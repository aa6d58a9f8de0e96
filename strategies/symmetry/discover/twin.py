"""A copy of a model in float64 whose parameters are shaken, on which symmetries are followed and proven."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.symmetry import SymmetryError

# Noise on the parameters, as a fraction of the root mean square of a tensor.
_NOISE = 0.3

# Numbers that are drawn for a large tensor: a prime, which no length of a row divides.
_DRAWN = 262_147


@contextmanager
def double_twin(model: nn.Module) -> Iterator[nn.Module]:
    """Give a model in float64 whose parameters are shaken, all of them to a size that has an effect.

    It is a copy, or the model itself if its forward method was replaced by a function: a copy would run on the tensors
    of the model. In that case the model has its own tensors again afterwards.

    Raises:
        SymmetryError: the model cannot be copied.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(isinstance(vars(module).get("forward"), FunctionType) for module in model.modules()):
        saved = [tensor.data for tensor in tensors]
        experts = _choose_experts(model, "batched_mm")
        try:
            for tensor in tensors:
                tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data.clone()
            _shake_all(model)
            yield model
        finally:
            for tensor, data in zip(tensors, saved, strict=True):
                tensor.data = data
            if experts is not None:
                _choose_experts(model, experts)
        return
    twin = _copy(model)
    _shake_all(twin)
    yield twin


def _copy(model: nn.Module) -> nn.Module:
    try:
        # Weights that a hook computes are no leaves, which deepcopy refuses; the hook computes them again.
        computed = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor))
        twin = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed if not t.is_leaf})
        # On the CPU, because some accelerators have no float64.
        twin = twin.cpu().double()
    except Exception as error:  # a model may hold anything
        raise SymmetryError(f"{type(model).__name__} cannot be copied: {error}") from error
    _choose_experts(twin, "batched_mm")
    return twin


def _choose_experts(model: nn.Module, name: str) -> str | None:
    """Choose how a model of the transformers library multiplies its experts, and return how it did.

    Grouped products exist for narrow types alone, and loops over experts visit those that the data choose.
    """
    implementation = None
    for module in model.modules():
        choose: Any = getattr(module, "set_experts_implementation", None)
        if choose is not None:
            implementation = implementation or getattr(module.config, "_experts_implementation", None)
            choose(name)
    return implementation


def _shake_all(twin: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point() and parameter.numel():
                _shake(parameter, generator)
        for buffer in twin.buffers():
            if buffer.is_floating_point() and buffer.numel() and not bool(buffer.isinf().any()):
                # A buffer may be a variance, which must stay positive.
                noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64).to(buffer.device)
                buffer.copy_(torch.where(buffer == 0, _NOISE * noise.abs(), buffer * torch.exp(_NOISE * noise)))


def draw_noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Draw normal numbers, of which a large tensor has the same again and again: its rows still differ."""
    drawn = torch.randn(min(tensor.numel(), _DRAWN), generator=generator, dtype=torch.float64)
    return drawn.repeat(-(-tensor.numel() // _DRAWN))[: tensor.numel()].view(tensor.shape).to(tensor.device)


def _shake(parameter: Tensor, generator: torch.Generator) -> None:
    noise = draw_noise(parameter, generator)
    size = float(parameter.square().mean().sqrt())
    # Small scales, such as those of fresh branches, are lifted: what has no effect would hide what it multiplies.
    inputs = parameter[0].numel() if parameter.dim() > 1 else 1
    least = 1.0 if parameter.dim() <= 1 or inputs == 1 else inputs**-0.5
    if parameter.dim() <= 1:
        # Scales and biases below 0 would silence units, of which the outputs then tell nothing.
        noise = noise.abs()
    parameter.add_(noise * max(_NOISE * size, least if size < least / 3 else 0.0))


def as_in(twin: nn.Module, tensor: Tensor) -> Tensor:
    """Return an input on the device of the model in float64, in its type."""
    device = next((t.device for t in twin.state_dict().values()), tensor.device)
    return tensor.to(device, torch.float64 if tensor.is_floating_point() else tensor.dtype)


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return all names of each tensor of the state, by the first of them.

    Tensors that overlap without being equal are left out: no axis of one is an axis of the other.
    """
    names: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(_memory(tensor), []).append(name)
    return {
        group[0]: tuple(group)
        for memory, group in names.items()
        if not any(_overlap(memory, rival) for rival in names if rival != memory)
    }


def _memory(tensor: Tensor) -> tuple[object, ...]:
    start = int(tensor.storage_offset())
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.untyped_storage().data_ptr() or id(tensor)
    return storage, start, start + steps + 1, tuple(tensor.shape), tensor.stride()


def _overlap(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]  # type: ignore[operator]
