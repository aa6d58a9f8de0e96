"""Names of tensors that differ between files of one architecture: prefixes, repeated heads, and unread buffers.

    h.0.attn.c_attn.weight, transformer.h.0.attn.c_attn.weight      the library leaves out the name of the inner model
    lm_head.weight equal to model.embed_tokens.weight               a tied head that older versions stored twice
    model.layers.0.self_attn.rotary_emb.inv_freq                    angles and masks that are computed today

The result has the names of the first model, without what only some models have and none reads.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedbasin.server.files.reading import StoredModel
from fedbasin.strategies.tensors.state import State

# Buffers that versions of the `transformers` library stored, and that no version reads.
_UNREAD = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention|self_attn)\.(masked_bias|bias)|position_ids|embed_positions\.inv_freq)"
)

# Heads and tables that may share one weight, or the bias of a head.
_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out|decoder|output|output_projection|embed_tokens|shared)\.(weight|bias)")


class RenamedState(Mapping[str, Tensor]):
    """A state under other names.

    Args:
        state: the state.
        names: its name of each tensor, by the new name.
    """

    def __init__(self, state: State, names: Mapping[str, str]) -> None:
        self._state, self._names = state, names

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class CommonNames:
    """The names under which the tensors of all models are merged.

    Attributes:
        names: for each model its stored name of each tensor, by the name in the result.
        dropped: names in the result of tensors that only some models have, and none needs.
    """

    names: Mapping[Path, Mapping[str, str]]
    dropped: tuple[str, ...]


def common_names(models: Mapping[Path, StoredModel]) -> CommonNames:
    """Return the names of a merge; what fits no name of the first model keeps its own.

    Args:
        models: the models, the first of which gives the names.
    """
    reference = next(iter(models.values()))
    names = {path: _in_names_of(reference, model) for path, model in models.items()}
    stored = [set(own) for own in names.values()]
    everywhere = {name for name in stored[0] if all(name in others for others in stored)}
    partial = sorted({name for own in stored for name in own} - everywhere)
    dropped = {name for name in partial if _is_unread(name, models, names) or _repeats(name, everywhere, models, names)}
    kept = {path: {name: old for name, old in own.items() if name not in dropped} for path, own in names.items()}
    return CommonNames(kept, tuple(sorted(dropped)))


def _own(model: StoredModel) -> dict[str, str]:
    return {name: name for name in model}


def _in_names_of(reference: StoredModel, model: StoredModel) -> dict[str, str]:
    """Return a model's names by those of the reference, if one of the two has a prefix that the other lacks."""
    own = _own(model)
    shared = _readable(reference)
    for prefix in {name.partition(".")[0] + "." for name in (*reference, *model) if "." in name}:
        longer = {f"{prefix}{name}": name for name in model}
        shorter = {name.removeprefix(prefix): name for name in model}
        for renamed in (longer, shorter):
            if len(renamed) == len(own) and _readable(own) != shared and _readable(renamed) == shared:
                return renamed
    return own


def _readable(names: Mapping[str, object]) -> set[str]:
    return {name for name in names if not _UNREAD.fullmatch(name) and not _HEAD.fullmatch(name)}


def _is_unread(name: str, models: Mapping[Path, StoredModel], names: Mapping[Path, Mapping[str, str]]) -> bool:
    """Return True if a tensor is a buffer: rotary frequencies, position ids, or a causal mask, which has four axes."""
    if not _UNREAD.fullmatch(name):
        return False
    holders = [models[path][own[name]] for path, own in names.items() if name in own]
    return not name.endswith(".bias") or all(tensor.dim() == 4 for tensor in holders)


def _repeats(
    name: str, everywhere: set[str], models: Mapping[Path, StoredModel], names: Mapping[Path, Mapping[str, str]]
) -> bool:
    """Return True if a head is stored beside the token table whose weight it has, in every model that stores it."""
    if not _HEAD.fullmatch(name) or any(model.config.get("tie_word_embeddings") is False for model in models.values()):
        return False
    states = [RenamedState(models[path], own) for path, own in names.items() if name in own]
    shape = states[0][name].shape
    tables = [other for other in everywhere if all(state[other].shape == shape for state in states)]
    return any(all(torch.equal(state[name], state[table]) for state in states) for table in tables)
