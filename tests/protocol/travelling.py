"""What of a model travels: all of it, or its adapters alone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def has_adapters(model: nn.Module) -> bool:
    """Whether `peft` has made it."""
    return hasattr(model, "peft_config")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What a client sends, in the layout that travels."""
    return {name: tensor.contiguous() for name, tensor in _state(model).items()}


def receive(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take what a server sends, in place."""
    if not has_adapters(model):
        model.load_state_dict(dict(state))
        return
    from peft import set_peft_model_state_dict  # takes seconds, and other models do without

    set_peft_model_state_dict(model, dict(state))


def freeze(model: nn.Module, factor: str) -> None:
    """Leave one factor of all adapters as it is: `lora_A` or `lora_B`; nothing for an empty name."""
    for name, parameter in model.named_parameters():
        if factor and factor in name:
            parameter.requires_grad_(False)


def _state(model: nn.Module) -> Mapping[str, Tensor]:
    if not has_adapters(model):
        return model.state_dict()
    from peft import get_peft_model_state_dict

    return dict[str, torch.Tensor](get_peft_model_state_dict(model))
