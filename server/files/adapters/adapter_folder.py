"""An adapter's folder: `adapter_config.json` and `adapter_model.safetensors`, read so that the scale is in the factors.

    W + s B A        s = alpha / r, or alpha / sqrt(r) with use_rslora; of each module by rank_pattern, alpha_pattern

    LoRA       x.lora_A.weight [r, in]   x.lora_B.weight [out, r]   x.lora_B.bias (lora_bias)
    embedding  x.lora_embedding_A [r, words]   x.lora_embedding_B [width, r]
    DoRA       x.lora_magnitude_vector: m (W + s B A) / |W + s B A|, norms of each output
    AdaLoRA    x.lora_A, x.lora_B, x.lora_E [r, 1]: A is E A, s = alpha / (r + 1e-5)
    loralib    x.lora_A, x.lora_B

Hu et al. 2022, arXiv 2106.09685; Kalajdzievski 2023 (rsLoRA), arXiv 2312.03732; Liu et al. 2024 (DoRA), arXiv
2402.09353; Zhang et al. 2023 (AdaLoRA), arXiv 2303.10512. `peft` need not be installed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedbasin.server.files.reading import ModelError, few, read_json
from fedbasin.strategies.tensors.parallel import is_finite

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"

_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\."
    r"(?:lora_(?P<embedding>embedding_)?(?P<part>[ABE])(?P<bias>\.bias|\.weight)?|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_PREFIX = re.compile(r"^base_model\.model\.")

# Added to the rank of an AdaLoRA adapter by `peft`.
_ADALORA = 1e-5

# Settings under which an adapter is a low-rank product, or which only say how it was trained. Others are refused where
# they are set, because those of a later `peft` may change what an adapter computes.
_KNOWN = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "ensure_weight_tying",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "monteclora_config",
        "qalora_group_size",
        "runtime_config",
        "target_r",
        "init_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
    ]
)

# Initialisations that take a part of the base's weights away.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, eq=False)
class AdapterModule:
    """The adapter of one layer, with its scale in the factor B.

    Attributes:
        down: A, `[r, in, ...]`.
        up: B times the scale, `[out, r, ...]`.
        is_embedding: True if the layer's weight is `[in, out]`, as that of an embedding.
        bias: change of the layer's bias, if there is one.
        magnitude: norm of each output's weights, of a DoRA adapter.
    """

    down: Tensor
    up: Tensor
    is_embedding: bool = False
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.down)


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """An adapter in a folder.

    Attributes:
        path: the folder.
        config: content of its configuration.
        modules: the adapters of its layers, by the names of the layers.
        others: tensors that replace those of the base, by the base's names.
    """

    path: Path
    config: Mapping[str, Any]
    modules: Mapping[str, AdapterModule]
    others: Mapping[str, Tensor] = field(default_factory=dict)


def is_adapter(path: Path) -> bool:
    """Return True if a folder holds an adapter."""
    return (path / ADAPTER_CONFIG).is_file()


def split_model(path: Path) -> tuple[Path, ...]:
    """Return base and adapter of a path BASE+ADAPTER, or the path alone; either may have a plus in its own name."""
    if path.exists():
        return (path,)
    parts = str(path).split("+")
    pairs = [
        (Path("+".join(parts[:number])), Path("+".join(parts[number:])))
        for number in range(1, len(parts))
        if parts[number - 1] and parts[number]
    ]
    there = [pair for pair in pairs if pair[0].exists() and is_adapter(pair[1])]
    return next(iter(there or pairs), (path,))


def open_adapter(path: Path) -> StoredAdapter:
    """Read an adapter.

    Raises:
        ModelError: it cannot be read, is of a kind that has no low-rank product, or contradicts its configuration.
    """
    if not is_adapter(path):
        inside = sorted(str(found.parent) for found in path.glob(f"*/{ADAPTER_CONFIG}"))
        advice = f"give one of {few(inside)}" if inside else "give the folder that `save_pretrained` of `peft` wrote"
        raise ModelError(f"{path}: has no {ADAPTER_CONFIG}; {advice}")
    config = read_json(path / ADAPTER_CONFIG)
    _refuse_unknown(path, config)
    try:
        tensors = load_file(path / ADAPTER_MODEL)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path / ADAPTER_MODEL}: cannot be read: {error}; save the adapter as safetensors") from error
    parts: dict[str, dict[str, Tensor]] = {}
    replacements = {}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ModelError(f"{path / ADAPTER_MODEL}: {name!r} is infinite or not a number; leave this adapter out")
        match = _NAME.fullmatch(name)
        if match is None:
            replacements[_PREFIX.sub("", name).replace(".base_layer.", ".")] = tensor
            continue
        part = "magnitude" if match["magnitude"] else match["part"] + ("bias" if match["bias"] == ".bias" else "")
        module = parts.setdefault(match["module"], {})
        module[part] = tensor
        if match["embedding"]:
            module["embedding"] = tensor
    if not parts:
        raise ModelError(f"{path / ADAPTER_MODEL}: has no tensor named lora_A; it is no low-rank adapter")
    modules = {name: _make_module(path, name, module, config) for name, module in parts.items()}
    return StoredAdapter(path, config, modules, replacements)


def _refuse_unknown(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise ModelError(f"{path / ADAPTER_CONFIG}: peft_type is {kind!r}; adapters of LORA and ADALORA can be merged")
    for key, value in config.items():
        # An empty table is a setting with defaults; of the lists an empty one is none.
        if key not in _KNOWN and value not in (None, False, []):
            raise ModelError(
                f"{path / ADAPTER_CONFIG}: {key} is {value!r}, which is not known to be a low-rank product; merge the "
                "adapter into its base by `merge_and_unload` of `peft`, and merge the models"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(path, key, config.get(key) or {})
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_RESIDUAL):
        raise ModelError(
            f"{path / ADAPTER_CONFIG}: init_lora_weights {start!r} changes the base model; save the adapter with "
            "path_initial_model_for_weight_conversion"
        )


def _check_pattern(path: Path, key: str, patterns: object) -> None:
    """Refuse ranks or alphas by module that are no table of regular expressions and numbers."""
    if not isinstance(patterns, dict):
        raise ModelError(f"{path / ADAPTER_CONFIG}: {key} is {patterns!r}; it must have names of modules and numbers")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelError(f"{path / ADAPTER_CONFIG}: {key} has the pattern {pattern!r}: {error}") from error


def _make_module(path: Path, name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> AdapterModule:
    if missing := [part for part in "AB" if part not in parts]:
        raise ModelError(f"{path / ADAPTER_MODEL}: {name!r} has no lora_{missing[0]}; save both factors")
    down, up = parts["A"], parts["B"]
    if down.shape[0] != up.shape[1]:
        raise ModelError(
            f"{path / ADAPTER_MODEL}: {name!r} has the ranks {down.shape[0]} and {up.shape[1]} in A and B; save it again"
        )
    # What the configuration does not switch on `peft` would not load, and what is missing it would begin anew.
    for part, key in (("magnitude", "use_dora"), ("Bbias", "lora_bias")):
        if (part in parts) != bool(config.get(key)) and (part in parts or part == "magnitude"):
            there = "has a" if part in parts else "has no"
            raise ModelError(
                f"{path / ADAPTER_MODEL}: {name!r} {there} {part.replace('Bb', 'b')}, but {key} is {config.get(key)!r} "
                f"in {ADAPTER_CONFIG}; use the configuration that was saved with them"
            )
    scale = _scale(path, name, len(down), config)
    # In double, so that the product changes by no more than one rounding.
    module = AdapterModule(down.double(), scale * up.double(), "embedding" in parts)
    if "E" in parts:
        module = replace(module, down=parts["E"].double() * module.down)
    if "Bbias" in parts:
        module = replace(module, bias=scale * parts["Bbias"].double())
    return replace(module, magnitude=parts["magnitude"].double()) if "magnitude" in parts else module


def _scale(path: Path, name: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = _of_module(name, config.get("alpha_pattern"), config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(
            f"{path / ADAPTER_CONFIG}: lora_alpha is {alpha!r}, so the scale of {name!r} is unknown; give it"
        )
    if config["peft_type"] == "ADALORA":
        start = config.get("init_r")
        if not isinstance(start, int) or start < 1:
            raise ModelError(f"{path / ADAPTER_CONFIG}: init_r is {start!r}, which the scale is divided by; give it")
        # The rank of the configuration counts also where a layer has less.
        return (alpha if alpha > 0 else start) / (start + _ADALORA)
    expected = _of_module(name, config.get("rank_pattern"), config.get("r"))
    if expected != rank:
        raise ModelError(
            f"{path / ADAPTER_CONFIG}: gives {name!r} the rank {expected}, but its factors have {rank}; the scale would "
            "be wrong: use the configuration that was saved with them"
        )
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _of_module(name: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """Return the value of the first pattern that is the end of a module's name, as `peft` chooses it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def other_base(adapter: StoredAdapter, base: Path) -> str | None:
    """Return the base that an adapter's configuration names, if it has another name than the given one."""
    named = adapter.config.get("base_model_name_or_path")
    return str(named) if named and Path(str(named)).name not in (base.name, base.resolve().name) else None


def describe_difference(first: StoredAdapter, other: StoredAdapter) -> str | None:
    """Return why two adapters cannot be merged; None if they can."""
    if missing := sorted(first.modules.keys() ^ other.modules.keys()):
        return f"only one of them adapts {few(missing)}"
    if missing := sorted(first.others.keys() ^ other.others.keys()):
        return f"only one of them has {few(missing)}"
    for name, module in first.modules.items():
        peer = other.modules[name]
        shapes = [(m.down.shape[1:], m.up.shape[:1], m.is_embedding) for m in (module, peer)]
        if shapes[0] != shapes[1]:
            return f"{name!r} is {tuple(module.up.shape)} {tuple(module.down.shape)} and {tuple(peer.up.shape)} {tuple(peer.down.shape)}"
        for part in ("magnitude", "bias"):
            if (getattr(module, part) is None) != (getattr(peer, part) is None):
                return f"only one of them has a {part} at {name!r}; a DoRA and another adapter have no mean"
    return None
