"""Settings of a recipe that change nothing: a filter that fits no tensor, and parameters of the base model.

Files of mergekit have such filters for tensors of other architectures, so they are not refused.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from fedbasin.server.files.merge.plan import PlannedTensor
from fedbasin.server.files.merge.recipe import MergeRecipe


def unused_settings(recipe: MergeRecipe, plan: Sequence[PlannedTensor]) -> tuple[str, ...]:
    """Return a sentence's end for each setting that changes no tensor of a plan."""
    names = {name for tensor in plan for name in (tensor.name, *(origin.name for origin in tensor.origins))}
    found: dict[str, None] = {}
    for part in recipe.parts:
        base = part.base_model or recipe.base_model
        for source in part.sources:
            if source.parameters and source.model == base and recipe.rule.anchor != "none":
                found[f"parameters of {source.model}, which is the base model"] = None
        for parameters in (recipe.parameters, part.parameters, *(source.parameters for source in part.sources)):
            for parameter, setting in parameters.items():
                for pattern, is_reached in _filters(setting):
                    if not is_reached:
                        found[f"filter {pattern!r} of {parameter}, which stands behind one for all tensors"] = None
                    elif not any(pattern in name for name in names):
                        found[f"filter {pattern!r} of {parameter}, which fits no tensor"] = None
    return tuple(found)


def _filters(setting: Any) -> Iterator[tuple[str, bool]]:
    """Yield the filters of a setting, each with whether a tensor may come to it."""
    entries = [setting] if isinstance(setting, dict) else setting
    is_reached = True
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict):
            continue
        pattern = entry.get("filter")
        if pattern in (None, "*"):
            if not is_reached:
                yield "*", False
            is_reached = False
        else:
            yield pattern, is_reached
        yield from _filters(entry.get("value"))
