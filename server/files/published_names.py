"""Names that the `transformers` library gives to the tensors of a published file.

The library renames some tensors when it loads a file and back when it saves one, and stores a tied table once.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fedbasin.server.files.reading import ModelError

# For every family: checkpoints that were converted from TensorFlow.
_ALWAYS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

# The first pattern that fits a name counts, so special cases stand above general ones.
_FAMILIES = {
    "vit": (
        (r"encoder\.layer\.(\d+)\.attention\.attention\.query\.", r"layers.\1.attention.q_proj."),
        (r"encoder\.layer\.(\d+)\.attention\.attention\.key\.", r"layers.\1.attention.k_proj."),
        (r"encoder\.layer\.(\d+)\.attention\.attention\.value\.", r"layers.\1.attention.v_proj."),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.o_proj."),
        (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.fc1."),
        (r"encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.fc2."),
        (r"encoder\.layer\.(\d+)\.", r"layers.\1."),
    )
}


def library_names(config: Mapping[str, Any], stored: Iterable[str]) -> dict[str, str]:
    """Return the stored name of each tensor by the name that the library gives to it.

    Args:
        config: the config of the model.
        stored: names in the model's files.

    Raises:
        ModelError: two stored tensors have the same name in the library.
    """
    patterns = (*_FAMILIES.get(config["model_type"], ()), *_ALWAYS)
    names: dict[str, str] = {}
    for name in stored:
        changed = (re.sub(pattern, new, name) for pattern, new in patterns)
        library_name = next((new for new in changed if new != name), name)
        twin = names.setdefault(library_name, name)
        if twin != name:
            raise ModelError(f"{twin!r} and {name!r} are old and new name of one tensor; keep one")
    # T5 stores a tied head only as the table. Its name tells a model with a head, whose stream stays inside, from an
    # encoder that returns the stream, which therefore must not be transformed.
    has_head = any(str(name).endswith("ConditionalGeneration") for name in config.get("architectures") or ())
    if config["model_type"] == "t5" and has_head and "shared.weight" in names:
        names.setdefault("lm_head.weight", names["shared.weight"])
    return names
