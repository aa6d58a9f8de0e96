"""What a family calls the tensors of a published file, where the file calls them otherwise or leaves them out.

The `transformers` library renames on loading and back on saving, and stores a tied table once.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fedbasin.server.files.reading import ModelError

# Of every family: checkpoints that were once TensorFlow's.
_ALWAYS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

# The first that fits a name counts.
_FAMILIES = {
    "vit": (
        (r"encoder\.layer\.(\d+)\.attention\.attention\.query\.", r"layers.\1.attention.q_proj."),
        (r"encoder\.layer\.(\d+)\.attention\.attention\.key\.", r"layers.\1.attention.k_proj."),
        (r"encoder\.layer\.(\d+)\.attention\.attention\.value\.", r"layers.\1.attention.v_proj."),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.o_proj."),
        (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.fc1."),
        (r"encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.fc2."),
        (r"encoder\.layer\.(\d+)\.", r"layers.\1."),
    ),
}


def library_names(config: Mapping[str, Any], stored: Iterable[str]) -> dict[str, str]:
    """For each name that the library would use the stored one.

    Args:
        config: of the model.
        stored: names in its files.

    Raises:
        ModelError: two stored tensors are one to the library.
    """
    patterns = (*_FAMILIES.get(config["model_type"], ()), *_ALWAYS)
    names: dict[str, str] = {}
    for name in stored:
        other = names.setdefault(_renamed(name, patterns), name)
        if other != name:
            raise ModelError(f"{other!r} and {name!r} are old and new name of one tensor; keep one")
    return names | _tied_head(config, names)


def _renamed(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    changed = (re.sub(pattern, new, name) for pattern, new in patterns)
    return next((found for found in changed if found != name), name)


def _tied_head(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """T5's language head, which tells a stream that stays inside from one that is handed out."""
    headed = any(
        str(name).endswith("ConditionalGeneration") for name in config.get("architectures") or ()
    )
    tied = config["model_type"] == "t5" and headed and "lm_head.weight" not in names
    return {"lm_head.weight": names["shared.weight"]} if tied and "shared.weight" in names else {}
