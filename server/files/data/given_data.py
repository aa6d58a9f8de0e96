"""Data that a user gives a command: a function without arguments that returns batches, `package.module:function`."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fedbasin.server.files.library.user_function import import_function
from fedbasin.server.files.reading import ModelError
from fedbasin.strategies.tasks.likelihoods import TaskError
from fedbasin.strategies.tasks.model_task import TASKS, Task, task_of
from fedbasin.strategies.tensors.batches import Batches


def read_data(name: str, module: nn.Module | None, option: str = "--data") -> Batches:
    """Return the batches that a function returns or yields, as a `DataLoader` has them.

    They are kept in memory, so that every model is evaluated on the same examples, also where a loader shuffles.

    Args:
        name: the function, `package.module:function`.
        module: the module that is run on them; an encoder-decoder gets what its decoder reads, where it is left out.
        option: the option that names it, for errors.

    Raises:
        ModelError: there is no such function, it fails, or it returns no batches.
    """
    function = import_function(name, option)
    try:
        data = function()
        batches = list(data) if isinstance(data, Iterable) else None
    except (Exception, SystemExit) as error:  # the user's own code may raise anything, or be a script
        raise ModelError(f"{option} {name}: {type(error).__name__}: {error}") from error
    if not batches:
        kind = "no batches" if batches is not None else f"a {type(data).__name__}"
        raise ModelError(
            f"{option} {name}: returns {kind}; return a DataLoader or a list of batches (inputs, targets), or yield them"
        )
    try:
        return [_with_decoder_inputs(batch, module) for batch in batches]
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{option} {name}: {type(module).__name__} makes no decoder_input_ids of its labels: {error}; give them"
        ) from error


def _with_decoder_inputs(batch: Any, module: nn.Module | None) -> Any:
    """Return a batch with the labels moved on by one token, which encoder-decoders of `transformers` decode from."""
    prepare = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None or not isinstance(batch, Mapping) or "labels" not in batch:
        return batch
    if {"decoder_input_ids", "decoder_inputs_embeds"} & batch.keys():
        return batch
    return {**batch, "decoder_input_ids": prepare(labels=batch["labels"])}


def read_task(name: str) -> Task:
    """Return the task of a name.

    Raises:
        ModelError: there is no such task.
    """
    try:
        return task_of(name)
    except TaskError as error:
        raise ModelError(f"--task {name}: is unknown; give one of {', '.join(TASKS)}") from error
