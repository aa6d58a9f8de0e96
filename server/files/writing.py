"""A model written in the layout of another: the same files, headers and order of bytes, with other values.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON, from names to dtype,
shape and offsets) and the tensors' bytes. A header says nothing about values, so it is copied as it is and the
tensors follow one by one: no more than one is in memory, and what is not moved is the same bytes.

What is written stands under a name of its own until it is whole.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fedbasin.server.files.reading import INDEX, SINGLE, ModelError, StoredModel

# What else in a model's folder would hold its old weights.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".onnx", ".gguf")


def write(
    model: StoredModel, target: Path, state: Mapping[str, Tensor], written: Callable[[int], None]
) -> None:
    """Write a state in a model's layout, and copy what else its folder has; replaces what is there.

    Args:
        model: gives the layout.
        target: file or folder, as the model is; `refuse_target` says whether it may be written.
        state: the values, of the model's names, shapes and dtypes.
        written: told the bytes of each tensor.

    Raises:
        ModelError: the target cannot be written, or a tensor would change its shape or dtype.
    """
    try:
        with _part(target) as part:
            if not model.is_folder:
                _write_file(model.path, part, state, written)
                return
            shutil.copytree(model.path, part, ignore=_old_weights)
            for shard in model.shards:
                _write_file(shard, part / shard.name, state, written)
            if SINGLE not in {shard.name for shard in model.shards}:
                shutil.copyfile(model.path / INDEX, part / INDEX)
    except OSError as error:
        raise ModelError(
            f"{target}: cannot be written: {error.strerror or error}; nothing was left behind"
        ) from error


def refuse_target(model: StoredModel, target: Path, *, force: bool) -> None:
    """Refuse to write over something that is not to be replaced.

    Args:
        model: gives the layout.
        target: where it would be written.
        force: whether a model at `target` is replaced.

    Raises:
        ModelError: naming what is in the way.
    """
    refuse_existing(target, force=force)
    if not target.exists():
        return
    if model.is_folder != target.is_dir():
        kinds = ("a file", "a folder")
        raise ModelError(
            f"{target}: is {kinds[target.is_dir()]} and would become {kinds[model.is_folder]}"
        )
    if target.is_dir() and not any((target / name).is_file() for name in (SINGLE, INDEX)):
        raise ModelError(f"{target}: is a folder without a model; --force replaces models only")


def refuse_existing(target: Path, *, force: bool) -> None:
    """Refuse to write where there is no folder to write in, or something already.

    Raises:
        ModelError: saying which.
    """
    if not target.parent.is_dir():
        raise ModelError(f"{target}: its folder does not exist; make it first")
    if target.exists() and not force:
        raise ModelError(f"{target}: is there already; give another name, or --force to replace it")


def refuse_overlap(source: Path, target: Path) -> None:
    """Refuse to write over, into or around something else of the same command.

    Raises:
        ModelError: the two overlap.
    """
    own, other = source.resolve(), target.resolve()
    if own == other:
        raise ModelError(f"{target}: is {source} itself; give another name")
    if own in other.parents or other in own.parents:
        raise ModelError(f"{target}: overlaps {source}; write beside it")


def left_out(model: StoredModel) -> list[str]:
    """Files of the model's folder that hold weights of other formats, which are not written."""
    if not model.is_folder:
        return []
    return sorted(
        str(path.relative_to(model.path))
        for path in model.path.rglob("*")
        if path.suffix in _WEIGHTS and path not in model.shards
    )


@contextmanager
def _part(target: Path) -> Iterator[Path]:
    """A sibling of the target that takes its place when all went well, and is gone when it did not."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        yield part
        if target.is_dir():
            # A folder that is not empty cannot be replaced in one step.
            target.rename(old)
        part.replace(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        _remove(part)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _old_weights(_folder: str, names: list[str]) -> list[str]:
    # Hidden folders are version control and caches.
    return [
        name for name in names if name.endswith((*_WEIGHTS, ".index.json")) or name.startswith(".")
    ]


def _write_file(
    source: Path, target: Path, state: Mapping[str, Tensor], written: Callable[[int], None]
) -> None:
    with source.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    with target.open("xb") as file:
        file.write(length + header)
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
            start, stop = entries[name]["data_offsets"]
            content = _bytes(state[name])
            if len(content) != stop - start:
                raise ModelError(f"{target}: {name!r} has {len(content)} bytes for {stop - start}")
            file.write(content)
            written(stop - start)
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
