"""The names of a client's own tensors where only low-rank adapters travel.

The `peft` library saves adapters without the adapter's own name: `x.lora_A.default.weight` in the model is
`x.lora_A.weight` in `get_peft_model_state_dict`, and `x.modules_to_save.default.weight` is `x.weight`. The base model
does not travel.
"""

import re

from torch import Tensor, nn

from fedbasin.strategies.fusion.lora.adapter_scales import SCALE
from fedbasin.strategies.tensors.state import State

# The groups are the part of a name that is saved; the rest of the match is left out.
_SAVED = re.compile(r"(lora_magnitude_vector)\.[^.]+\.weight|(lora_[A-Za-z_]+)\.[^.]+(?=\.|$)|modules_to_save\.[^.]+\.")


def model_names(model: nn.Module, state: State) -> dict[str, str]:
    """Return the model's own name for each tensor of a state, scales of adapters apart.

    Raises:
        ValueError: the model has no such tensor.
    """
    tensors = model.state_dict()
    saved = {_SAVED.sub(lambda match: match[1] or match[2] or "", name): name for name in tensors}
    # A scale is an attribute of the model's layers, and no tensor.
    weights = (name for name in state if not name.endswith(SCALE))
    names = {name: name if name in tensors else saved.get(name, "") for name in weights}
    if unknown := [name for name, own_name in names.items() if not own_name]:
        adapters = ", with its adapters" if any(".lora_" in name for name in state) else ""
        raise ValueError(
            f"the model has no tensor {unknown[0]!r}; give basin(model=...) the model whose state travels{adapters}"
        )
    return names


def complete_state(model: nn.Module, state: State) -> dict[str, Tensor]:
    """Return all tensors of a model, with those of the state in place of its own.

    A state without adapters is returned as it is, because a tensor that is missing from it is an error.

    Raises:
        ValueError: the model has no such tensor.
    """
    # Adapters alone are always partial; of any other state a missing tensor would go unnoticed.
    if not any(".lora_" in name for name in state):
        return dict(state)
    names = model_names(model, state)
    return {**model.state_dict(), **{own_name: state[name] for name, own_name in names.items()}}
