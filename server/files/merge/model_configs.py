"""Where the configurations of models differ: weights of one shape may belong to functions of different kinds."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedbasin.server.files.reading import CONFIG, ModelError, StoredModel

# Keys that say how a model was saved, and nothing of its function.
_ORIGIN = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "use_cache"})

# Keys of the numbers and widths of heads, which cut weights of one shape into different parts.
_HEADS = re.compile(
    r"(.*\.)?(num_(attention|key_value|encoder_attention|decoder_attention)_heads|n_heads?|num_heads|head_dim|d_kv)"
)


def config_differences(reference: StoredModel, models: Iterable[StoredModel]) -> tuple[str, ...]:
    """Return the keys in which configurations differ from the reference's, those that both have before others."""
    own = dict(_entries(reference.config))
    both: dict[str, None] = {}
    one: dict[str, None] = {}
    for other in (dict(_entries(model.config)) for model in models if model.config and own):
        for key in sorted(own.keys() | other.keys()):
            if own.get(key) != other.get(key):
                (both if key in own and key in other else one)[key] = None
    return (*both, *(key for key in one if key not in both))


def refuse_other_heads(models: Mapping[Path, StoredModel]) -> None:
    """Refuse models whose attention has other heads than that of the first.

    Raises:
        ModelError: names the key and its values.
    """
    (first, reference), *rest = models.items()
    entries = dict(_entries(reference.config))
    for path, model in rest:
        for key, value in _entries(model.config):
            if _HEADS.fullmatch(key) and None not in (value, entries.get(key)) and value != entries[key]:
                raise ModelError(
                    f"{path / CONFIG}: {key} is {value!r}, but {entries[key]!r} in {first}, so the same rows belong to "
                    "other heads; merge models of one architecture"
                )


def _entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of a configuration and of those in it, as of a text and a vision model, with dotted keys."""
    for key, value in config.items():
        if key in _ORIGIN:
            continue
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
