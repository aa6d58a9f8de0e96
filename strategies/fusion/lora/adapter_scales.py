"""Scales of low-rank adapters as part of a state, so that clients with other alphas, ranks or rules mean the same.

    W + s B A        x.lora_scale = s, a number beside the factors x.lora_A and x.lora_B

A factor is multiplied by `s / s'` where the state goes from the scale `s` to `s'`; the product stays.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedbasin.strategies.fusion.lora.lora_factors import Adapter, AdapterError, adapter_pairs
from fedbasin.strategies.tensors.state import State

SCALE = ".lora_scale"


def scale_name(adapter: Adapter) -> str:
    """Return the name of an adapter's scale in a state."""
    return adapter.down.rpartition(".lora_")[0] + SCALE


def scales_of(state: State) -> dict[str, Tensor]:
    """Return the scales in a state; empty where they do not travel."""
    return {name: tensor for name, tensor in state.items() if name.endswith(SCALE)}


def with_scales(model: nn.Module, state: State) -> dict[str, Tensor]:
    """Return the adapters' state with the scale of each, as the first state of a run.

    Args:
        model: the adapted model of the `peft` library.
        state: its adapters, under the names of `get_peft_model_state_dict`.

    Raises:
        AdapterError: the model has no scale for an adapter.
    """
    return {**state, **read_scales(model, map(scale_name, adapter_pairs(state)))}


def read_scales(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return scales by name from a model's layers, which hold them as `scaling`, by the name of the adapter.

    Raises:
        AdapterError: a layer has no scale, or one that is not positive.
    """
    scales = {}
    for name in names:
        value = next(iter(_scaling(model, name).values()), 0.0)
        if not value > 0:
            raise AdapterError(f"{name!r}: the model's scale is {value}; give every adapter a positive lora_alpha")
        scales[name] = torch.tensor(float(value))
    return scales


def set_scales(model: nn.Module, scales: State) -> None:
    """Give a model's layers the scales of a state, in place, so that they run its factors."""
    for name, scale in scales.items():
        scaling = _scaling(model, name)
        for adapter in scaling:
            scaling[adapter] = float(scale)


def to_scales(state: State, scales: State, factor: Literal["down", "up"] = "up") -> dict[str, Tensor]:
    """Return the state with other scales and the same products.

    Args:
        state: adapters with their scales.
        scales: scales by name; adapters without one stay as they are.
        factor: the factor that is multiplied, and not the one that is frozen.
    """
    result = dict(state)
    for adapter in adapter_pairs(state):
        name = scale_name(adapter)
        if name in scales and name in state and not torch.equal(state[name], scales[name]):
            ratio = float(state[name]) / float(scales[name])
            changed = [getattr(adapter, factor)]
            # A bias behind B is scaled with the product.
            changed += (
                [bias] if (bias := adapter.up.replace(".weight", ".bias")) in state and bias != adapter.up else []
            )
            result |= {key: state[key] * ratio for key in changed}
            result[name] = scales[name]
    return result


def _scaling(model: nn.Module, name: str) -> dict[str, Any]:
    try:
        scaling = model.get_submodule(name.removesuffix(SCALE)).scaling
    except AttributeError as error:
        raise AdapterError(
            f"{name!r}: the model has no adapter with a scale there; give the adapted model of the peft library"
        ) from error
    return scaling  # type: ignore[return-value]
