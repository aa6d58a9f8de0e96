"""The difference of two models as a low-rank adapter: the closest product of a rank in every layer.

    fine - base = U S V^T        B = U_r sqrt(S_r)        A = sqrt(S_r) V_r^T

By Eckart and Young 1936, Psychometrika 1, no other product of the rank is closer. Biases travel whole (`bias: all`),
modules of other kinds, such as norms, in `modules_to_save`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedbasin.server.files.adapters.adapter_folder import AdapterModule, StoredAdapter
from fedbasin.server.files.library.executable_model import ExecutableModel
from fedbasin.server.files.library.tensor_layout import ModuleState
from fedbasin.server.files.reading import ModelError, StoredModel, few, refuse_not_finite
from fedbasin.server.files.shared_tensors import require_equal_shapes
from fedbasin.strategies.tensors.state import State

# Layers that `peft` adapts, by the names of their classes; those of `transformers` have their weight as [in, out].
_TRANSPOSED = "Conv1D"
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Extraction:
    """An adapter, and what it keeps.

    Attributes:
        adapter: the adapter, with a scale of 1.
        kept: part of the squared norm of the change that it keeps.
        saved: modules that it holds whole.
    """

    adapter: StoredAdapter
    kept: float
    saved: tuple[str, ...]


def extract_adapter(base: StoredModel, executable: ExecutableModel, fine: StoredModel, rank: int) -> Extraction:
    """Return the adapter of a rank that takes a base closest to a fine-tuned model.

    Args:
        base: the base.
        executable: its module, whose classes say what each tensor is.
        fine: the fine-tuned model.
        rank: largest rank of a layer's product.

    Raises:
        ModelError: the models differ in their tensors or not at all, an entry is not finite, or a change belongs to no
            module.
    """
    require_equal_shapes(fine, base)
    for model in (base, fine):
        refuse_not_finite(model, model.path)
    change = _Change(executable, base, fine)
    if not change.names:
        raise ModelError(f"{fine.path} and {base.path} hold the same tensors; there is nothing to extract")
    saved = change.saved()
    modules: dict[str, AdapterModule] = {}
    biases, norms = {}, [0.0, 0.0]
    for name, layer in change.layers(saved):
        delta, table = change.matrix(name, layer), change.table_of(name)
        if table in modules:
            # To the bit, so that a reader sees that the two are one change of one tensor.
            modules[name] = AdapterModule(modules[table].up.T, modules[table].down.T)
        else:
            modules[name], kept = _factorise(delta, rank, layer)
            norms = [norms[0] + kept, norms[1] + float(delta.square().sum())]
        if f"{name}.bias" in change.names:
            biases[f"{name}.bias"] = change.fine[f"{name}.bias"]
    whole = {n: t for n, t in change.fine.items() if any(n.startswith(f"{module}.") for module in saved)}
    return Extraction(
        StoredAdapter(fine.path, _config(base, executable, modules, biases, saved), modules, whole | biases),
        norms[0] / norms[1] if norms[1] else 1.0,
        saved,
    )


class _Change:
    """The change from a base to a fine-tuned model, in the names of their module."""

    def __init__(self, executable: ExecutableModel, base: StoredModel, fine: StoredModel) -> None:
        self.modules = dict(executable.module.named_modules(remove_duplicate=False))
        self.base, self.fine = (ModuleState(executable.layout, model) for model in (base, fine))
        self.names = {name for name in self.base if not torch.equal(self.base[name], self.fine[name])}
        self._path = fine.path

    @cached_property
    def is_transposed(self) -> bool:
        """True if the layers have their weights as `[in, out]`."""
        return any(type(module).__name__ == _TRANSPOSED for module in self.modules.values())

    def saved(self) -> tuple[str, ...]:
        """Return the modules that are held whole, because a change in them is no product or bias of a layer."""
        owners = {name.rpartition(".")[0] for name in self.names if not self._is_adapted(*name.rpartition(".")[::2])}
        if "" in owners:
            raise ModelError(f"{self._path}: {few(sorted(n for n in self.names if '.' not in n))} is in no module")
        # Without those that lie in another.
        return tuple(sorted(o for o in owners if not any(o.startswith(f"{p}.") for p in owners)))

    def layers(self, saved: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
        """Yield the layers that are adapted: a bias needs its layer, also where the weight is unchanged."""
        names = {name.rpartition(".")[0] for name in self.names}
        # Tables first, whose products their heads repeat.
        for name in sorted(names, key=lambda name: (not isinstance(self.modules[name], nn.Embedding), name)):
            if not any(name == module or name.startswith(f"{module}.") for module in saved):
                yield name, self.modules[name]

    def matrix(self, name: str, layer: nn.Module) -> Tensor:
        """Return the change of a layer's weight as `[out, in]`, in double."""
        weight = f"{name}.weight"
        delta = self.fine[weight].double() - self.base[weight].double()
        return (delta.T if _is_transposed(layer) else delta).flatten(1)

    def _is_adapted(self, name: str, part: str) -> bool:
        layer = self.modules.get(name)
        if isinstance(layer, nn.Embedding):
            return part == "weight"
        if type(layer).__name__ == _TRANSPOSED:
            return part in ("weight", "bias")
        is_layer = isinstance(layer, _LAYERS) and getattr(layer, "groups", 1) == 1
        # A configuration has one orientation for all layers; the head of a tied table has no bytes of its own.
        return is_layer and part in ("weight", "bias") and (not self.is_transposed or self.table_of(name) != "")

    def table_of(self, name: str) -> str:
        """Return the embedding that a linear layer shares its weight with; empty for every other layer."""
        layer = self.modules[name]
        if not isinstance(layer, nn.Linear):
            return ""
        tables = ((n, m) for n, m in self.modules.items() if isinstance(m, nn.Embedding))
        return next((n for n, table in tables if table.weight is layer.weight), "")


def _is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) or type(layer).__name__ == _TRANSPOSED


def _factorise(delta: Tensor, rank: int, layer: nn.Module) -> tuple[AdapterModule, float]:
    """Return the closest product, and the squared norm that it keeps."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    if isinstance(layer, _LAYERS[1:]):
        kernel = layer.weight.shape[2:]
        down = down.reshape(rank, -1, *kernel)
        up = up.reshape(*up.shape, *(1 for _ in kernel))
    return AdapterModule(down, up, isinstance(layer, nn.Embedding)), float(values[:rank].square().sum())


def _config(
    base: StoredModel,
    executable: ExecutableModel,
    modules: Mapping[str, AdapterModule],
    biases: State,
    saved: tuple[str, ...],
) -> dict[str, Any]:
    kinds = {type(module).__name__ for module in executable.module.modules()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(base.path),
        "target_modules": sorted(modules),
        "modules_to_save": list(saved) or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": _TRANSPOSED in kinds,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
