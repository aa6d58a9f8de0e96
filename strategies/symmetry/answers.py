"""The answers of a model: the outputs that a symmetry must not change.

A published model returns a mapping of its outputs by name. Logits, embeddings and predictions are answers. Hidden
states, caches and attention weights are answers only where the model has no head: with a head, an element may move
them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

# What a model returns besides its answers.
_STATES = re.compile(r"hidden_states?$|pooler_output$|^extract_features$")
_INTERNAL = re.compile(r"^(encoder|decoder)_|^past_|^cache|attentions?$|^loss$|^hidden_states$|^mems$|^state$")
_HEADS = re.compile(r"logits|_embeds$")


def answers(model: nn.Module, output: Any) -> Any:
    """Return the outputs of a model that an element must not change, if it returns a mapping; else all of them.

    Args:
        model: the model.
        output: the result of its forward method.
    """
    if not isinstance(output, Mapping):
        return output
    values = {name: tensors for name, value in output.items() if (tensors := _tensors(value))}
    values = {name: tensors for name, tensors in values.items() if not _INTERNAL.search(name)} or values
    # A published model is its own base where it has no head.
    has_head = getattr(model, "base_model", model) is not model or any(_HEADS.search(name) for name in values)
    heads = {name: tensors for name, tensors in values.items() if not _STATES.search(name)}
    chosen = heads if has_head and heads else values
    return tuple(tensor for tensors in chosen.values() for tensor in tensors)


def _tensors(value: Any) -> tuple[Tensor, ...]:
    """Return the floating tensors of an output; a nested mapping is the output of a part, and not an answer."""
    if isinstance(value, Tensor):
        return (value,) if value.is_floating_point() and value.numel() else ()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(tensor for item in value for tensor in _tensors(item))
    return ()
