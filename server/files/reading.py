"""A model on disk, read tensor by tensor: a safetensors file, or a folder of the `transformers` layout.

    MODEL.safetensors
    MODEL/config.json   MODEL/model.safetensors
    MODEL/config.json   MODEL/model.safetensors.index.json   MODEL/model-00001-of-00002.safetensors ...

Tensors are views of the mapped file: pages are read when their values are used, and released with the last tensor
that lies on them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedbasin.strategies.tensors.parallel import is_finite, one_core
from fedbasin.strategies.tensors.state import State

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

# Endings of files that may hold weights.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".onnx", ".gguf")

# First bytes of a file that Git LFS left in place of another, and of files of `torch.save`.
_POINTER = b"version https://git-lfs"
_PICKLES = (b"PK", b"\x80")

_ONLY = "only safetensors files are read"
_SAVE = "load the model with the library that wrote it and save it with `save_pretrained`"


class ModelError(ValueError):
    """A model that cannot be read or written; the message names file and tensor, and what to do."""


@dataclass(frozen=True, eq=False)
class StoredModel(Mapping[str, Tensor]):
    """The state of a model in files, whose tensors are read one by one.

    Attributes:
        path: the file or folder.
        files: for each tensor the file that holds it.
        config: content of a folder's config.json; empty without one.
        metadata: metadata of the file, or of the folder's first shard.
    """

    path: Path
    files: Mapping[str, Path]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        try:
            # Opened for each tensor: one mapping for all would keep every page until its last tensor is gone.
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, AttributeError) as error:
            raise ModelError(f"{path}: tensor {name!r} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def is_folder(self) -> bool:
        """True if the model is a folder, and not a single file."""
        return self.path not in self.files.values()

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files with tensors, in the order of their names."""
        return tuple(sorted(set(self.files.values())))

    @property
    def ties(self) -> dict[str, str]:
        """The names that the files leave out, each with the name under which its tensor is stored."""
        return {
            name: stored for name, stored in self.metadata.items() if name not in self.files and stored in self.files
        }

    @property
    def readers(self) -> tuple[Path, ...]:
        """Weights of further modules of the folder, which read this model's output, as in sentence-transformers.

        Such a module is listed in modules.json, or has a config.json of its own.
        """
        if not self.is_folder:
            return ()
        listed = self.path / "modules.json"
        entries = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
        folders = {
            self.path / str(entry.get("path")) for entry in entries if isinstance(entry, dict) and entry.get("path")
        }
        folders |= {path.parent for path in self.path.glob(f"*/{CONFIG}")}
        return tuple(sorted(path for folder in folders for path in folder.glob("*") if path.suffix in WEIGHTS))

    def shapes(self) -> dict[str, Tensor]:
        """Return tensors of the same names, shapes and dtypes that need no memory."""
        return {name: torch.empty_like(tensor, device="meta") for name, tensor in self.items()}


def open_model(path: Path) -> StoredModel:
    """Open the model at a path; only headers are read.

    Raises:
        ModelError: there is no model, a header does not parse, or index and shards contradict each other.
    """
    if path.is_dir():
        files = _files_of_folder(path)
        config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    elif path.is_file():
        files, config = dict.fromkeys(_names(path), path), {}
    else:
        raise ModelError(
            f"{path}: there is no such file or folder; give a .safetensors file, or a folder with {CONFIG} and {SINGLE}"
        )
    if not files:
        raise ModelError(f"{path}: there are no tensors in it; was it saved whole?")
    with safe_open(min(files.values()), "pt") as file:
        return StoredModel(path, files, config, dict(file.metadata() or {}))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ModelError: the file cannot be read, or holds another value than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ModelError(f"{path}: holds a {kind}; it must be an object of keys and values")
    return content


def _files_of_folder(folder: Path) -> dict[str, Path]:
    # The same order as in `transformers`: a single file wins over an index that was left beside it.
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)
    if (folder / INDEX).is_file():
        return _files_of_index(folder / INDEX)
    weights = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHTS)
    there = f"there is {few(weights)}; " if weights else ""
    given = "give a file itself, or" if any(name.endswith(".safetensors") for name in weights) else f"{_ONLY}:"
    raise ModelError(f"{folder}: neither {SINGLE} nor {INDEX} is in it; {there}{given} {_SAVE}")


def _files_of_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index}: has no weight_map from tensors to shards; fetch it again")
    for name, shard in weight_map.items():
        # A path would let an index read files outside the model's folder.
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".."):
            raise ModelError(f"{index}: the shard of {name!r} is {shard!r}, not a file beside it")
    files = {name: index.with_name(shard) for name, shard in weight_map.items()}
    _check_shards(index, files)
    return files


def _check_shards(index: Path, files: Mapping[str, Path]) -> None:
    """Refuse shards that are missing or hold other tensors than the index says."""
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise ModelError(f"{path}: {index} names this shard and it is missing; fetch it again")
        listed = {name for name, shard in files.items() if shard == path}
        stored = set(_names(path))
        if missing := sorted(listed - stored):
            raise ModelError(f"{path}: {few(missing)} missing, which {index} lists; fetch it again")
        if unlisted := sorted(stored - listed):
            raise ModelError(
                f"{index}: {few(unlisted)} missing in it, but {path.name} has them; fetch index and shards of one model"
            )


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: {_fault_of(path, error)}") from error


def _fault_of(path: Path, error: Exception) -> str:
    """Return why a file cannot be read, and what to do."""
    try:
        with path.open("rb") as content:
            start = content.read(len(_POINTER))
    except OSError:
        start = b""
    if start == _POINTER:
        return "is a pointer of Git LFS to the file; fetch it with `git lfs pull`"
    if start.startswith(_PICKLES):
        return f"holds pickled weights, which can run code when they are read; {_ONLY}: {_SAVE}"
    if path.suffix in WEIGHTS and path.suffix != ".safetensors":
        return f"{_ONLY}: {_SAVE}"
    return f"not a whole safetensors file ({error}); fetch or save it again"


def refuse_not_finite(state: State, path: Path) -> None:
    """Refuse a model with entries that are not finite, which a search would follow and no execution can prove.

    Args:
        state: the tensors that count; what the model does not read, such as old masks, may be infinite.
        path: where they are stored.

    Raises:
        ModelError: names the tensor.
    """
    with one_core():
        for name in state:
            if not is_finite(state[name]):
                raise ModelError(
                    f"{path}: {name!r} has entries that are infinite or not a number; leave this model out"
                )


def few(names: Sequence[str]) -> str:
    """Return the first three names, and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
