"""The tensors that a model returns to its user, which a symmetry must not change."""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

# Parts of the parametrisation: caches, attention weights and what one part of a model passes to the next.
_INTERNAL = re.compile(r"^(encoder|decoder)_|^past_|^cache|attentions?$|(^|_)hidden_states$|^mems$|^state$")
_STATES = re.compile(r"hidden_states?$|pooler_output$|^extract_features$")
_HEADS = re.compile(r"logits|_embeds$|^loss|loss$|reconstruction$|^pred_|^predicted_")


def answers(output: object) -> list[Tensor]:
    """Return the floating tensors of an output that a symmetry must keep.

    Of a mapping these are all tensors, and sequences of tensors, but caches, attention weights and what an encoder
    passes on; a nested mapping is the output of a part. The last hidden states belong to the parametrisation where the
    model has a head, which logits, embeddings of a projection, predictions and losses tell.
    """
    if not isinstance(output, Mapping):
        return list(_floating(output))
    values = {str(name): value for name, value in output.items() if not isinstance(value, Mapping)}
    values = {name: value for name, value in values.items() if not _INTERNAL.search(name)}
    if any(_HEADS.search(name) and value is not None for name, value in values.items()):
        values = {name: value for name, value in values.items() if not _STATES.search(name)}
    return list(_floating(values)) or list(_floating(output))


def _floating(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if (output.is_floating_point() or output.is_complex()) and output.numel():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _floating(value)
