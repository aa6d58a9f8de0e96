"""A client's own model where only low-rank adapters travel: which of its tensors they are.

The `peft` library saves adapters without their own name: `x.lora_A.default.weight` in the model is `x.lora_A.weight`
in `get_peft_model_state_dict`, and `x.modules_to_save.default.weight` is `x.weight`. The base stays at home.
"""

import re

from torch import Tensor, nn

from fedbasin.strategies.tensors.state import State

# What is saved of a name, and what is left out of it.
_NAMED = re.compile(
    r"(lora_magnitude_vector)\.[^.]+\.weight|(lora_[A-Za-z_]+)\.[^.]+(?=\.|$)|modules_to_save\.[^.]+\."
)


def model_names(model: nn.Module, state: State) -> dict[str, str]:
    """For each tensor of a state the name that the model has for it.

    Raises:
        ValueError: the model has no such tensor.
    """
    own = model.state_dict()
    saved = {_NAMED.sub(lambda match: match[1] or match[2] or "", name): name for name in own}
    names = {name: name if name in own else saved.get(name, "") for name in state}
    if unknown := [name for name, found in names.items() if not found]:
        raise ValueError(
            f"the model has no tensor {unknown[0]!r}; give fedbasin.client.basin the model whose state travels, "
            "with its adapters"
        )
    return names


def completed(model: nn.Module, state: State) -> dict[str, Tensor]:
    """All of the model's tensors, those of the state in place of its own.

    A state without adapters is returned as it is: what is missing from that is an error.

    Raises:
        ValueError: as `model_names`.
    """
    if not any(".lora_" in name for name in state):
        return dict(state)
    names = model_names(model, state)
    return {**model.state_dict(), **{names[name]: tensor for name, tensor in state.items()}}
