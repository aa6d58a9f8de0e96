"""A stored model as a module and its state in the module's names, to be evaluated on data."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedbasin.server.files.library.executable_model import ExecutableModel
from fedbasin.server.files.library.tensor_layout import ModuleState
from fedbasin.server.files.reading import ModelError, StoredModel, few
from fedbasin.server.files.stored_symmetry import SymmetricModel
from fedbasin.strategies.tasks.likelihoods import TaskError
from fedbasin.strategies.tensors.parallel import is_finite
from fedbasin.strategies.tensors.state import State

Result = TypeVar("Result")


def require_executable(model: SymmetricModel) -> ExecutableModel:
    """Return the module of a model whose parameters are all stored.

    Raises:
        ModelError: the module is not known, or the files lack a parameter, which would be random.
    """
    executable = model.executable
    if executable is None:
        raise ModelError(f"{model.stored.path}: a file does not say which module it is for; give --module or --config")
    require_parameters(model.stored, executable)
    return executable


def require_parameters(stored: StoredModel, executable: ExecutableModel) -> None:
    """Refuse a model whose files lack parameters of its module.

    Raises:
        ModelError: names them.
    """
    missing = [name for name, _ in executable.module.named_parameters() if name in executable.layout.missing]
    if missing:
        raise ModelError(
            f"{stored.path}: has no {few(missing)}, so outputs of {executable.kind} would be random; give a model "
            "with its head"
        )


def runnable_state(model: SymmetricModel, state: State) -> dict[str, Tensor]:
    """Return a state in the names of a symmetry as the module has it: in float32, with its counters."""
    executable = require_executable(model)
    # A symmetry that was given by hand is in the names of the files.
    named = ModuleState(executable.layout, state) if model.by_hand else state
    wide = {name: named[name].to(torch.float32) for name in named}
    counters = {name: t for name, t in executable.module.state_dict().items() if not t.is_floating_point()}
    return {**counters, **wide}


def module_state(executable: ExecutableModel, path: Path, state: State) -> dict[str, Tensor]:
    """Return a state in the names of the files as the module has it, in float32.

    Args:
        executable: the module.
        path: path of the model, for errors.
        state: its tensors.

    Raises:
        ModelError: an entry is not finite.
    """
    named = ModuleState(executable.layout, state)
    result = {name: named[name].float() for name in named}
    for name, tensor in result.items():
        if not is_finite(tensor):
            raise ModelError(f"{path}: {name!r} has entries that are infinite or not a number; leave this model out")
    return result


def run(module: nn.Module, data: str, compute: Callable[[], Result]) -> Result:
    """Return what a computation of a module on data returns.

    Raises:
        ModelError: the data do not fit the module.
    """
    try:
        return compute()
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
        remedy = "; --task names the task" if isinstance(error, TaskError) else ""
        raise ModelError(f"{data}: {type(module).__name__} cannot be evaluated on it: {error}{remedy}") from error
