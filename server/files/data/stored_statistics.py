"""Statistics of a model in a file: collected where its data are, and merged elsewhere.

A safetensors file with a tensor for each layer, as it was summed: no normalisation or shrinkage. Its metadata say what
was collected, of which layers, and the digest of the model's tensors, because statistics hold for these weights alone.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedbasin.proto.layer_graph import Block
from fedbasin.server.files.data.given_data import read_data, read_task
from fedbasin.server.files.data.model_on_data import require_parameters, run
from fedbasin.server.files.library.executable_model import ExecutableModel
from fedbasin.server.files.library.tensor_layout import ModuleState
from fedbasin.server.files.reading import ModelError, StoredModel, refuse_not_finite
from fedbasin.server.files.writing import replacing
from fedbasin.strategies.statistics.fisher import diagonal_fisher
from fedbasin.strategies.statistics.gram import grams
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batches
from fedbasin.strategies.tensors.parallel import is_finite
from fedbasin.strategies.tensors.state import State

# Names of the statistics, as rules have them.
KINDS = ("fisher", "gram")

_KIND, _LAYERS, _DIGEST = "fedbasin.statistic", "fedbasin.layers", "fedbasin.model"


@dataclass(frozen=True)
class StoredStatistics:
    """Statistics in a file, whose tensors are read when they are needed.

    Attributes:
        path: the file.
        kind: `fisher` or `gram`.
        digest: digest of the model's tensors.
        layers: the tensor of each layer; layers that read the same inputs have one.
    """

    path: Path
    kind: str
    digest: str
    layers: Mapping[Block, str]

    def read(self) -> dict[Block, Tensor]:
        """Return the statistics of each layer.

        Raises:
            ModelError: the file lacks a tensor.
        """
        try:
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in set(self.layers.values())}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.path}: cannot be read: {error}; collect the statistics again") from error
        return {block: tensors[name] for block, name in self.layers.items()}


def is_statistics(name: str) -> bool:
    """Return True if the data of a merge are a file of statistics, and not a function."""
    return name.endswith(".safetensors")


def open_statistics(path: Path) -> StoredStatistics:
    """Open a file of statistics; only its header is read.

    Raises:
        ModelError: there is no such file, or it holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        kind, digest = metadata[_KIND], metadata[_DIGEST]
        layers = {tuple(block): name for block, name in json.loads(metadata[_LAYERS])}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; write it by fedbasin statistics") from error
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: holds no statistics; write it by fedbasin statistics") from error
    return StoredStatistics(path, kind, digest, layers)


def write_statistics(
    model: StoredModel, executable: ExecutableModel, kind: str, data: str, task: str | None, target: Path
) -> StoredStatistics:
    """Collect the statistics of a model on data, and write them.

    Args:
        model: the model.
        executable: its module, with the model's tensors.
        kind: `fisher` or `gram`.
        data: function that returns the batches, `package.module:function`.
        task: name of the task, which only Fisher information depends on; None takes what the first batch shows.
        target: the file.

    Raises:
        ModelError: the data do not fit the model, or the file cannot be written.
    """
    require_parameters(model, executable)
    refuse_not_finite(ModuleState(executable.layout, model), model.path)
    batches, chosen = read_data(data, executable.module), None if task is None else read_task(task)
    collected = run(executable.module, data, partial(_collect, executable.module, batches, kind, chosen))
    for block, tensor in collected.items():
        if not is_finite(tensor):
            raise ModelError(f"{model.path}: the statistics of {block[0]!r} are infinite or not a number; check {data}")
    numbers: dict[int, str] = {}
    layers = [(block, numbers.setdefault(id(tensor), block[0])) for block, tensor in collected.items()]
    tensors = {name: collected[block].contiguous() for block, name in layers if name == block[0]}
    metadata = {_KIND: kind, _DIGEST: digest_of(model), _LAYERS: json.dumps(layers)}
    try:
        with replacing(target) as part:
            save_file(tensors, part, metadata)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}; nothing was left behind") from error
    return open_statistics(target)


def _collect(module: nn.Module, batches: Batches, kind: str, task: Task | None) -> dict[Block, Tensor]:
    if kind == "gram":
        return grams(module, batches)
    values = diagonal_fisher(module, batches, torch.Generator().manual_seed(0), task)
    return {(name,): tensor for name, tensor in values.items()}


def digest_of(state: State) -> str:
    """Return a digest of the names and values of a state's tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
