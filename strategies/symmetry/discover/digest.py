"""A digest of a model and its example, by which a discovered symmetry can be found again."""

import hashlib
import inspect
from collections.abc import Iterator
from types import CodeType

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size)


def digest(model: nn.Module, inputs: tuple[Tensor | None, ...]) -> str:
    """Return the SHA-256 of all that decides how a model computes, apart from the values of its tensors.

    These are the classes of its modules with their source, their attributes, the names, shapes and ties of its tensors,
    and the example. An attribute of an unknown type enters by its `repr`, which differs from process to process where
    it shows an address: such a model is discovered anew, and never confused with another.
    """
    sha = hashlib.sha256(torch.__version__.encode())
    for line in (*_modules(model), *_tensors(model), *_example(inputs)):
        sha.update(line.encode() + b"\n")
    return sha.hexdigest()


def _modules(model: nn.Module) -> Iterator[str]:
    sources: dict[type, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if kind not in sources:
            sources[kind] = "".join(_source(base) for base in kind.__mro__ if base not in nn.Module.__mro__)
        yield f"{name} {kind.__module__}.{kind.__qualname__} {hashlib.sha256(sources[kind].encode()).hexdigest()}"
        for key, value in sorted(vars(module).items()):
            if key not in ("_parameters", "_buffers", "_modules", "training"):
                yield f"{key} {_described(value)}"


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return repr(sorted(vars(kind)))


def _described(value: object) -> str:
    """Return a text that is equal for equal attributes."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(repr(value.tolist()).encode()).hexdigest()}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        return f"{type(value).__name__}({', '.join(map(_described, value))})"
    if isinstance(value, dict):
        return ", ".join(f"{_described(key)}: {_described(entry)}" for key, entry in value.items())
    code = getattr(value, "__code__", None)
    if isinstance(code, CodeType):
        closure = [_described(cell.cell_contents) for cell in getattr(value, "__closure__", None) or ()]
        return f"{code.co_code.hex()} {code.co_consts} {code.co_names} {closure}"
    return repr(value)


def _tensors(model: nn.Module) -> Iterator[str]:
    first_names: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        first_name = first_names.setdefault(tensor.untyped_storage().data_ptr() or id(tensor), name)
        yield f"{name} {first_name} {tuple(tensor.shape)} {tensor.dtype} {type(tensor).__name__}"
    yield " ".join(model.state_dict())


def _example(inputs: tuple[Tensor | None, ...]) -> Iterator[str]:
    for tensor in inputs:
        if tensor is None or tensor.is_floating_point():
            yield "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        else:
            yield _described(tensor)
