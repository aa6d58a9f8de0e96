"""A digest of a model and its example, by which a discovered symmetry can be found again."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.discover.walk import STATISTICS

# Buffers that training changes without a change of what the model computes.
_COUNTED = (*STATISTICS, "num_batches_tracked")

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size)


def digest(model: nn.Module, inputs: tuple[Tensor | None, ...]) -> str:
    """Return the SHA-256 of all that decides how a model computes, apart from the values of its parameters.

    These are the classes of its modules with their source files, their attributes, the names, shapes and ties of its
    tensors, its constant buffers, and the example. An attribute of an unknown type enters by its `repr`, which differs
    from process to process where it shows an address: such a model is discovered anew, and never confused with another.
    What another version of torch or of this package has discovered has another digest.
    """
    sha = hashlib.sha256(f"{torch.__version__} {_own_code()}".encode())
    for line in (*_modules(model), *_tensors(model), *_example(inputs)):
        sha.update(line.encode() + b"\n")
    return sha.hexdigest()


@cache
def _own_code() -> str:
    """Return the digest of the package's own sources on symmetries."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _modules(model: nn.Module) -> Iterator[str]:
    classes: dict[type, str] = {}
    files: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if kind not in classes:
            bases = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
            files |= {base.__module__: _file(base.__module__) for base in bases if base.__module__ not in files}
            classes[kind] = " ".join(f"{files[base.__module__]} {_methods(base)}" for base in bases)
            yield classes[kind]
        yield f"{name} {kind.__module__}.{kind.__qualname__}"
        for key, value in sorted(vars(module).items()):
            # Hooks of the state are no part of the forward pass.
            if key not in ("_parameters", "_buffers", "_modules", "training") and "_state_dict_" not in key:
                yield f"{key} {_described(value)}"


def _file(module: str) -> str:
    """Return the digest of the source of a Python module, which holds the functions that its classes call."""
    try:
        return hashlib.sha256(Path(str(sys.modules[module].__file__)).read_bytes()).hexdigest()
    except (KeyError, AttributeError, OSError):
        return module


def _methods(kind: type) -> str:
    """Return the code of the methods of a class: two classes of one file may have one name."""
    functions = (getattr(value, "fget", None) or getattr(value, "__func__", value) for value in vars(kind).values())
    return " ".join(_function(function) for function in functions if hasattr(function, "__code__"))


def _function(function: Any) -> str:
    return f"{_code(function.__code__)} {[value for value in _contents(function) if isinstance(value, _PLAIN)]}"


def _contents(function: Any) -> Iterator[Any]:
    """Yield what a function closes over, as far as it is set already."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            yield cell.cell_contents


def _code(code: CodeType) -> str:
    constants = (_code(value) if isinstance(value, CodeType) else _described(value) for value in code.co_consts)
    return f"{code.co_code.hex()} {code.co_names} {' '.join(constants)}"


def _described(value: object) -> str:
    """Return a text that is equal for equal attributes."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {_bytes(value)}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_described, value))})"
    if isinstance(value, set | frozenset):
        # The order of a set of words differs from process to process.
        return f"{type(value).__name__}({', '.join(sorted(map(_described, value)))})"
    if isinstance(value, dict):
        return ", ".join(f"{_described(key)}: {_described(entry)}" for key, entry in value.items())
    if isinstance(value, partial):
        return f"{_described(value.func)} {_described(value.args)} {_described(value.keywords)}"
    if isinstance(value, BuiltinFunctionType):
        return f"{type(value.__self__).__name__} {value.__qualname__}"
    if isinstance(value, FunctionType):
        return f"{_code(value.__code__)} {list(map(_described, _contents(value)))}"
    return repr(value)


def _bytes(tensor: Tensor) -> str:
    if tensor.is_meta or not tensor.numel():
        return ""
    numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(numbers.numpy().data).hexdigest()


def _tensors(model: nn.Module) -> Iterator[str]:
    first_names: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        first_name = first_names.setdefault(tensor.untyped_storage().data_ptr() or id(tensor), name)
        yield f"{name} {first_name} {tuple(tensor.shape)} {tensor.dtype} {type(tensor).__name__}"
        if not (isinstance(tensor, nn.Parameter) or name.endswith(_COUNTED)):
            # Constants of a model, such as an index of channels, decide what it computes.
            yield _described(tensor)
    yield " ".join(model.state_dict())


def _example(inputs: tuple[Tensor | None, ...]) -> Iterator[str]:
    for tensor in inputs:
        if tensor is None or tensor.is_floating_point():
            yield "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        else:
            yield _described(tensor)
