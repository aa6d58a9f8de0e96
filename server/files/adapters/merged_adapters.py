"""The weighted sum of adapters, as one adapter whose scale is 1.

    sum_k w_k s_k B_k A_k = [w_1 s_1 B_1  w_2 s_2 B_2 ...] [A_1; A_2; ...]

Factors are stacked, so the sum of the products is exact for any alphas, ranks and scaling rules, at the sum of the
ranks. A smaller rank gives the closest product of that rank. Means of factors are not means of products.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedbasin.server.files.adapters.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    AdapterModule,
    StoredAdapter,
    describe_difference,
    is_adapter,
    open_adapter,
)
from fedbasin.server.files.merge.layer_names import depth_of, layer_counts
from fedbasin.server.files.merge.parameters import TensorPosition, rule_arguments
from fedbasin.server.files.merge.recipe import MergeRecipe
from fedbasin.server.files.reading import ModelError, few
from fedbasin.server.files.writing import refuse_existing, refuse_overlap, replacing
from fedbasin.strategies.fusion.lora.lowrank import LowRank
from fedbasin.strategies.fusion.rules.span import normalised
from fedbasin.strategies.tensors.parallel import is_finite

# Weights of the adapters at a layer.
Weigh = Callable[[str], Sequence[float]]


def merge_adapters(adapters: Sequence[StoredAdapter], weigh: Weigh, rank: int | None = None) -> StoredAdapter:
    """Return the weighted sum of adapters.

    Magnitudes of DoRA adapters and tensors that replace the base's, as a trained head, are averaged by the weights.

    Args:
        adapters: the adapters.
        weigh: returns the weights of the adapters at a layer or tensor, by its name.
        rank: largest rank of the result; None keeps the sum exact.

    Raises:
        ModelError: the adapters do not adapt the same layers, or are of kinds without a mean.
    """
    reference, *rest = adapters
    for rival in rest:
        if difference := describe_difference(reference, rival):
            raise ModelError(f"{rival.path} and {reference.path} cannot be merged: {difference}")
    modules = {
        name: _truncate(_add([adapter.modules[name] for adapter in adapters], name, weigh(name)), rank)
        for name in reference.modules
    }
    means = {
        name: _mean([adapter.others[name] for adapter in adapters], name, weigh(name)) for name in reference.others
    }
    return StoredAdapter(reference.path, reference.config, modules, means)


@dataclass(frozen=True)
class AdapterReport:
    """The report of a merge of adapters.

    Attributes:
        rule: name of the rule.
        adapters: paths of the adapters.
        output: path of the result.
        layers: number of adapted layers.
        rank: largest rank of the result.
        bases: names of the bases that the adapters' configurations give, each once.
    """

    rule: str
    adapters: tuple[str, ...]
    output: str
    layers: int
    rank: int
    bases: tuple[str, ...]


def merge_adapter_folders(recipe: MergeRecipe, target: Path) -> AdapterReport:
    """Merge the adapters of a recipe into a folder.

    Raises:
        ModelError: the recipe does more than to add, or the adapters do not fit.
    """
    if recipe.merge_method != "linear" or recipe.slices or recipe.align:
        raise ModelError(
            f"merge_method: adapters are added as products by linear, without slices and align; for {recipe.merge_method} "
            "write BASE+ADAPTER, which merges adapted models"
        )
    for key in ("score", "distill"):
        if getattr(recipe, key) is not None:
            raise ModelError(f"{key}: is of whole models; write BASE+ADAPTER for adapted models")
    if recipe.vocabulary is not None or recipe.base_model is not None:
        raise ModelError("base_model, tokenizer: belong to whole models; write BASE+ADAPTER to merge adapted models")
    adapters = [open_adapter(source.model) for source in recipe.parts[0].sources]
    counts = layer_counts(adapters[0].modules)

    def weigh(name: str) -> Sequence[float]:
        by_model = [(name, source.parameters) for source in recipe.parts[0].sources]
        weights, arguments = rule_arguments(
            recipe.rule, TensorPosition(name, depth_of(name, counts)), (recipe.parameters,), by_model
        )
        return normalised(weights).tolist() if arguments["normalize"] else weights

    try:
        merged = merge_adapters(adapters, weigh, recipe.rank)
    except ValueError as error:
        raise ModelError(str(error)) from error
    write_adapter(merged, target, getattr(torch, recipe.out_dtype or recipe.dtype or "float32"))
    bases = (adapter.config.get("base_model_name_or_path") for adapter in adapters)
    return AdapterReport(
        recipe.merge_method,
        tuple(str(adapter.path) for adapter in adapters),
        str(target),
        len(merged.modules),
        max(module.rank for module in merged.modules.values()),
        tuple(dict.fromkeys(str(base) for base in bases if base)),
    )


def refuse_adapter_target(sources: Iterable[Path], target: Path, *, force: bool) -> None:
    """Refuse a target that cannot or must not be replaced by an adapter.

    Raises:
        ModelError: it overlaps a source, its folder is missing, or something other than a replaceable adapter is there.
    """
    for source in sources:
        refuse_overlap(source, target)
    refuse_existing(target, force=force)
    if target.exists() and not is_adapter(target):
        raise ModelError(f"{target}: holds no adapter, which --force does not replace; give another name")


def write_adapter(adapter: StoredAdapter, target: Path, dtype: torch.dtype) -> None:
    """Write an adapter that `peft` loads, with a scale of 1 in every layer, in place of what is there.

    Raises:
        ModelError: the target cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        tensors |= {f"base_model.model.{name}.{part}": value for part, value in _parts(module).items()}
    tensors |= {f"base_model.model.{_adapted_name(adapter, name)}": value for name, value in adapter.others.items()}
    converted = {n: (t.to(dtype) if t.is_floating_point() else t).contiguous() for n, t in tensors.items()}
    if infinite := [name for name, tensor in converted.items() if not is_finite(tensor)]:
        raise ModelError(f"{few(infinite)}: not finite in {dtype}; choose a wider dtype or smaller weights")
    try:
        with replacing(target) as part:
            part.mkdir()
            save_file(converted, part / ADAPTER_MODEL, {"format": "pt"})
            (part / ADAPTER_CONFIG).write_text(json.dumps(_config(adapter), indent=2), encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}; nothing was left behind") from error


def _adapted_name(adapter: StoredAdapter, name: str) -> str:
    """Return the name that `peft` gives a tensor of the base: that of an adapted layer lies below its adapter."""
    layer, _, tensor = name.rpartition(".")
    return f"{layer}.base_layer.{tensor}" if layer in adapter.modules else name


def _add(modules: Sequence[AdapterModule], name: str, weights: Sequence[float]) -> AdapterModule:
    pairs = list(zip(weights, modules, strict=True))
    biases = [weight * module.bias for weight, module in pairs if module.bias is not None]
    magnitudes = [module.magnitude for module in modules if module.magnitude is not None]
    return replace(
        modules[0],
        down=torch.cat([module.down for module in modules]),
        up=torch.cat([weight * module.up for weight, module in pairs], dim=1),
        bias=sum(biases[1:], biases[0]) if biases else None,
        magnitude=_mean(magnitudes, name, weights) if magnitudes else None,
    )


def _truncate(module: AdapterModule, rank: int | None) -> AdapterModule:
    if rank is None or module.rank <= rank:
        return module
    product = LowRank(module.up.flatten(1), module.down.flatten(1)).balance(rank)
    up = product.left.reshape(len(module.up), rank, *module.up.shape[2:])
    return replace(module, up=up, down=product.right.reshape(rank, *module.down.shape[1:]))


def _mean(tensors: Sequence[Tensor], name: str, weights: Sequence[float]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if not sum(weights):
        raise ModelError(f"{name}: is averaged, but the weights add up to zero; change a weight")
    terms = [weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True)]
    return (sum(terms[1:], terms[0]) / sum(weights)).to(tensors[0].dtype)


def _parts(module: AdapterModule) -> dict[str, Tensor]:
    names = ("lora_embedding_A", "lora_embedding_B") if module.is_embedding else ("lora_A.weight", "lora_B.weight")
    parts = dict(zip(names, (module.down, module.up), strict=True))
    if module.bias is not None:
        parts["lora_B.bias"] = module.bias
    if module.magnitude is not None:
        parts["lora_magnitude_vector"] = module.magnitude
    return parts


def _config(adapter: StoredAdapter) -> Mapping[str, Any]:
    """Return the configuration with the result's ranks, and alphas equal to them."""
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    largest = max(ranks.values())
    # Anchored by `peft` at the end of a module's name.
    pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    changed = {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    adalora = {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
    return {key: value for key, value in adapter.config.items() if key not in adalora} | changed
