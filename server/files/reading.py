"""A model on disk, read tensor by tensor: a safetensors file, or a folder of the `transformers` layout.

    MODEL.safetensors
    MODEL/config.json   MODEL/model.safetensors
    MODEL/config.json   MODEL/model.safetensors.index.json   MODEL/model-00001-of-00002.safetensors ...

Tensors are views of the mapped file: asking for one reads nothing, its pages come when they are used and go
when the last tensor of them does.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


class ModelError(ValueError):
    """A model that cannot be read or written; the message names file and tensor, and what to do."""


@dataclass(frozen=True, eq=False)
class StoredModel(Mapping[str, Tensor]):
    """A state whose tensors are read when they are asked for.

    Attributes:
        path: the file or folder.
        files: for each tensor the file that holds it.
        config: what a folder's config.json says; empty without one.
        metadata: of the file, or of the folder's first shard.
    """

    path: Path
    files: Mapping[str, Path]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        try:
            # Opened for each tensor, because a mapping lives as long as the last tensor of it.
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
        """Whether the layout is that of a folder."""
        return self.path not in self.files.values()

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files with tensors, in the order of their names."""
        return tuple(sorted(set(self.files.values())))

    @property
    def ties(self) -> dict[str, str]:
        """Names that the file leaves out, because the tensor is stored under another name."""
        return {
            name: kept
            for name, kept in self.metadata.items()
            if name not in self.files and kept in self.files
        }

    def shapes(self) -> dict[str, Tensor]:
        """The same names with tensors that have shape and dtype and no memory."""
        return {name: torch.empty_like(tensor, device="meta") for name, tensor in self.items()}


def open_model(path: Path) -> StoredModel:
    """A model by its path; only headers are read.

    Raises:
        ModelError: there is none, a header does not parse, or index and shards disagree.
    """
    if path.is_dir():
        files = _folder(path)
        config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    elif path.is_file():
        files, config = dict.fromkeys(_names(path), path), {}
    else:
        raise ModelError(
            f"{path}: there is no such file or folder; give a .safetensors file, or a folder with "
            f"{CONFIG} and {SINGLE}"
        )
    if not files:
        raise ModelError(f"{path}: there are no tensors in it; was it saved whole?")
    return StoredModel(path, files, config, _metadata(min(files.values())))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: it cannot be read, or is no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{path}: holds a {type(found).__name__}, not an object of keys and values"
        )
    return found


def _folder(folder: Path) -> dict[str, Path]:
    # The library's own order: a single file wins over an index that was left beside it.
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)
    if (folder / INDEX).is_file():
        return _sharded(folder)
    others = sorted(
        path.name for end in ("safetensors", "bin", "pt") for path in folder.glob(f"*.{end}")
    )
    there = f"there are {', '.join(others[:5])}; " if others else ""
    raise ModelError(
        f"{folder}: neither {SINGLE} nor {INDEX} is in it; {there}give a file itself, or save the model with "
        "`save_pretrained`"
    )


def _sharded(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    files = {name: folder / shard for name, shard in _weight_map(index).items()}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise ModelError(f"{path}: {index} names this shard and it is missing; fetch it again")
        listed = {name for name, shard in files.items() if shard == path}
        stored = set(_names(path))
        if missing := sorted(listed - stored):
            raise ModelError(f"{path}: {few(missing)} missing, which {index} says are in it")
        if unlisted := sorted(stored - listed):
            raise ModelError(
                f"{index}: {few(unlisted)} missing in it, but {path.name} has them; index and shards "
                "are of different models"
            )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise ModelError(f"{index}: has no weight_map from tensors to shards")
    for name, shard in found.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelError(f"{index}: the shard of {name!r} is {shard!r}, not a file beside it")
    return found


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a whole safetensors file ({error}); fetch or save it again"
        ) from error


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def few(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
