"""A base model with an adapter, whose tensors are computed when they are read."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedbasin.server.files.adapters.adapter_folder import AdapterModule, StoredAdapter
from fedbasin.server.files.reading import ModelError, StoredModel, few
from fedbasin.server.files.stored_symmetry import Source, executable_of
from fedbasin.strategies.tensors.state import State


class AppliedAdapter(Mapping[str, Tensor]):
    """The state of a base model with an adapter in its weights, in the base's dtypes.

    Raises:
        ModelError: the base has no such layer, its weight has another shape, or a head shares an adapted table.
    """

    def __init__(self, base: StoredModel, adapter: StoredAdapter) -> None:
        _refuse_shared_table(base, adapter)
        adapter = adapter if _prefix(base, adapter) is not None else _in_stored_names(base, adapter)
        self._base, self._adapter = base, adapter
        self._prefix = _prefix(base, adapter) or ""
        shapes = base.shapes()
        self._check_replacements(shapes)
        for name, module in adapter.modules.items():
            if f"{name.removeprefix(self._prefix)}.weight" not in base and _repeats_table(module, adapter):
                continue
            _check_shape(adapter, name, module, shapes[f"{name.removeprefix(self._prefix)}.weight"])
            if module.bias is not None and f"{name.removeprefix(self._prefix)}.bias" not in base:
                raise ModelError(f"{adapter.path}: has a bias for {name!r}, which {base.path} has not; leave it out")

    def _check_replacements(self, shapes: State) -> None:
        """Refuse tensors that replace none of the base's, or one of another shape."""
        others = self._adapter.others
        held = {name: shapes.get(name.removeprefix(self._prefix), shapes.get(name)) for name in others}
        for name, stored in held.items():
            if stored is None and not any(
                held[table] is not None and torch.equal(others[name], others[table]) for table in others
            ):
                raise ModelError(
                    f"{self._adapter.path}: holds {name!r}, which {self._base.path} does not have; give the base with "
                    "the head that it was trained with"
                )
            if stored is not None and stored.shape != others[name].shape:
                raise ModelError(
                    f"{self._adapter.path}: holds {name!r} of shape {tuple(others[name].shape)}, which is "
                    f"{tuple(stored.shape)} in {self._base.path}; give the base that it was trained on, as after "
                    "`resize_token_embeddings`"
                )

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._base[name]
        layer, _, part = f"{self._prefix}{name}".rpartition(".")
        replacement = self._adapter.others.get(self._prefix + name, self._adapter.others.get(name))
        dtype = tensor.dtype
        # `peft` stores the weight of an adapted table beside its adapter, which is added to it.
        if replacement is not None:
            tensor = replacement.to(dtype)
        module = self._adapter.modules.get(layer)
        if module is None or part not in ("weight", "bias"):
            return tensor
        if part == "bias":
            return tensor if module.bias is None else (tensor.double() + module.bias).to(dtype)
        return _apply(tensor, module, self._adapter).to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def _prefix(base: StoredModel, adapter: StoredAdapter) -> str | None:
    """Return what the adapter's names have in front of the base's; None if they are others.

    Files of GPT-2 and others leave out the name of the inner model, such as `transformer.`.
    """
    names = list(adapter.modules)
    prefixes = dict.fromkeys(["", *(f"{name.partition('.')[0]}." for name in names)])
    for prefix in prefixes:
        if all(
            (name.startswith(prefix) and f"{name.removeprefix(prefix)}.weight" in base)
            or _repeats_table(module, adapter)
            for name, module in adapter.modules.items()
        ):
            return prefix
    return None


def _in_stored_names(base: StoredModel, adapter: StoredAdapter) -> StoredAdapter:
    """Return an adapter in the names of the base's files, which a library may load under other names.

    Raises:
        ModelError: the base has no such layer.
    """
    names = executable_of(base, Source()).layout.whole if "model_type" in base.config else {}
    stored = {name: file for file, name in names.items()}
    layers = {name.removesuffix(".weight"): file.removesuffix(".weight") for name, file in stored.items()}
    if missing := [name for name in adapter.modules if name not in layers]:
        raise ModelError(
            f"{adapter.path}: adapts {few(missing)}, which {base.path} does not have; give the base that it was "
            "trained on"
        )
    modules = {layers[name]: module for name, module in adapter.modules.items()}
    others = {stored.get(name, name): tensor for name, tensor in adapter.others.items()}
    return replace(adapter, modules=modules, others=others)


def _refuse_shared_table(base: StoredModel, adapter: StoredAdapter) -> None:
    """Refuse an adapter of a token table alone whose weight is also that of the head: in the base both would change.

    Raises:
        ModelError: names both.
    """
    tables = [f"{name}.weight" for name, module in adapter.modules.items() if module.is_embedding]
    replaced = [name for name in adapter.others if name.endswith(".weight")]
    if "model_type" not in base.config or not (tables or replaced):
        return
    parameters = dict(executable_of(base, Source()).module.named_parameters(remove_duplicate=False))
    for name in (*tables, *replaced):
        for sharing, parameter in parameters.items():
            is_adapted = _changes_alike(adapter, name, sharing)
            if sharing != name and parameter is parameters.get(name) and not is_adapted:
                raise ModelError(
                    f"{adapter.path}: changes {name!r}, but not {sharing!r}, and {base.path} has one weight for both; "
                    "adapt both alike (ensure_weight_tying), or train on a base with tie_word_embeddings false"
                )


def _changes_alike(adapter: StoredAdapter, name: str, sharing: str) -> bool:
    """Return True if an adapter leaves two tensors equal that are one in the base."""
    first, second = (adapter.others.get(tensor) for tensor in (name, sharing))
    if first is not None and second is not None and not torch.equal(first, second):
        return False
    layers = [adapter.modules.get(tensor.removesuffix(".weight")) for tensor in (name, sharing)]
    changed = [module for module in layers if module is not None]
    if not changed:
        return first is not None and second is not None
    return len(changed) == 2 and any(_repeats_table(module, adapter) for module in changed)


def _repeats_table(module: AdapterModule, adapter: StoredAdapter) -> bool:
    """Return True if a head has the product of a token table, whose tensor it shares in the base."""
    tables = (table for table in adapter.modules.values() if table.is_embedding and table.rank == module.rank)
    return any(_are_transposed(module, table) for table in tables)


def _are_transposed(head: AdapterModule, table: AdapterModule) -> bool:
    """Return True if the factors of a head are those of a table in turn; the scale is in one of them."""
    if head.up.shape != table.down.T.shape or head.down.shape != table.up.T.shape:
        return False
    norms = torch.linalg.vector_norm(head.up), torch.linalg.vector_norm(table.down)
    scale = norms[0] / norms[1] if norms[1] > 0 else torch.ones(())
    return torch.allclose(head.up, scale * table.down.T) and torch.allclose(scale * head.down, table.up.T)


def is_transposed(module: AdapterModule, adapter: StoredAdapter) -> bool:
    """Return True if the layer's weight is `[in, out]`."""
    return module.is_embedding or bool(adapter.config.get("fan_in_fan_out"))


def _check_shape(adapter: StoredAdapter, name: str, module: AdapterModule, weight: Tensor) -> None:
    shape = (module.up.shape[0], *module.down.shape[1:])
    if tuple(weight.shape) != (shape[::-1] if is_transposed(module, adapter) else shape):
        raise ModelError(
            f"{adapter.path}: is for a weight {shape} at {name!r}, which is {tuple(weight.shape)} in the base; give the "
            "base that it was trained on"
        )


def _apply(weight: Tensor, module: AdapterModule, adapter: StoredAdapter) -> Tensor:
    transposed = is_transposed(module, adapter)
    matrix = (weight.T if transposed else weight).double()
    changed = matrix + (module.up.flatten(1) @ module.down.flatten(1)).reshape(matrix.shape)
    if module.magnitude is not None:
        norms = torch.linalg.vector_norm(changed.flatten(1), dim=1)
        ratio = module.magnitude.reshape(-1) / norms
        changed = changed * ratio.reshape(-1, *[1] * (changed.dim() - 1))
    return changed.T if transposed else changed
