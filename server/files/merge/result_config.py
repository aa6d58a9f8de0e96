"""The config of a merged model: that of the reference, with what the merge changed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbasin.server.files.merge.plan import layer_sources
from fedbasin.server.files.reading import CONFIG

if TYPE_CHECKING:
    from fedbasin.server.files.merge.merge_models import PreparedMerge

# Keys of a config that hold the number of layers, by family.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def write_config(merge: "PreparedMerge", folder: Path) -> None:
    """Write the config into the folder of the result, where it differs from the reference's."""
    config: dict[str, Any] = dict(merge.reference.config)
    if not config:
        return
    if merge.recipe.slices:
        config |= _layer_config(merge, config)
    if merge.tokens is not None:
        if "vocab_size" in config:
            config["vocab_size"] = merge.tokens.size
        else:
            config["text_config"] = {**text_config(config), "vocab_size": merge.tokens.size}
    if dtype := merge.recipe.out_dtype or merge.recipe.dtype:
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    if config != merge.reference.config:
        (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the entries on a model's tokens, which those of several media have in a configuration of their own."""
    nested = config.get("text_config")
    return nested if "vocab_size" not in config and isinstance(nested, dict) else config


def _layer_config(merge: "PreparedMerge", config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config that depend on the layers, for the layers of the result."""
    sources = layer_sources(merge.plan)
    old = next((config[key] for key in _LAYERS if key in config), None)
    changed: dict[str, Any] = {key: len(sources) for key in _LAYERS if key in config}
    for key, value in config.items():
        # Such as the kind of attention in each layer.
        if isinstance(value, list) and len(value) == old:
            changed[key] = [merge.models[source.model].config[key][source.layer] for source in sources]
    return changed
