"""Output of models in the layout of a stored one: the same files, headers and order of bytes, with other values.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON, from names to dtype,
shape and offsets) and the tensors' bytes. A header does not depend on values, so it is copied, and the tensors follow
one by one: at most one is in memory, and a tensor that is not transformed keeps its bytes.

Files have a hidden name beside the target until they are complete.
"""

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedbasin.server.files.reading import INDEX, SINGLE, WEIGHTS, ModelError, StoredModel


def write(model: StoredModel, target: Path, state: Mapping[str, Tensor], on_write: Callable[[int], None]) -> None:
    """Write a state in a model's layout with the other files of its folder, and replace an existing target.

    Args:
        model: the model whose layout is used.
        target: file or folder, as the model is; must have passed `refuse_target`.
        state: the values, with the model's names, shapes and dtypes.
        on_write: called with the size in bytes of each tensor that was written.

    Raises:
        ModelError: the target cannot be written, or a tensor would change its shape or dtype.
    """
    try:
        with replacing(target) as part:
            if not model.is_folder:
                _write_file(model.path, part, state, on_write)
                return
            copy_other_files(model, part)
            for shard in model.shards:
                _write_file(shard, part / shard.name, state, on_write)
            if SINGLE not in {shard.name for shard in model.shards}:
                shutil.copyfile(model.path / INDEX, part / INDEX)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}; nothing was left behind") from error


def copy_other_files(model: StoredModel, folder: Path) -> None:
    """Make a folder with everything that is in a model's folder but weights, such as configs and the tokenizer."""
    shutil.copytree(model.path, folder, ignore=_weights_and_hidden)
    for reader in model.readers:
        shutil.copyfile(reader, folder / reader.relative_to(model.path))


def refuse_target(model: StoredModel, target: Path, *, force: bool) -> None:
    """Refuse a target that cannot or must not be replaced by a model.

    Args:
        model: the model whose layout is used.
        target: path of the output.
        force: whether an existing model may be replaced.

    Raises:
        ModelError: the target's folder is missing, or something other than a replaceable model exists there.
    """
    refuse_existing(target, force=force)
    if not target.exists():
        return
    if model.is_folder != target.is_dir():
        kinds = ("a file", "a folder")
        raise ModelError(
            f"{target}: is {kinds[target.is_dir()]} and would become {kinds[model.is_folder]}; give another name"
        )
    if target.is_dir() and any(target.iterdir()) and not any((target / name).is_file() for name in (SINGLE, INDEX)):
        raise ModelError(f"{target}: is a folder without a model, which --force does not replace; give another name")


def refuse_existing(target: Path, *, force: bool) -> None:
    """Refuse a target that exists, unless forced, or whose folder does not.

    Raises:
        ModelError: the target exists, or its folder does not.
    """
    if not target.parent.is_dir():
        raise ModelError(f"{target}: its folder does not exist; make it first")
    if target.exists() and not force:
        raise ModelError(f"{target}: is there already; give another name, or --force to replace it")


def refuse_overlap(source: Path, target: Path) -> None:
    """Refuse a target that is another path of the same command, lies in it or contains it.

    Raises:
        ModelError: the two paths overlap.
    """
    # Resolved, because a link to an input would be overwritten with it.
    source_path, target_path = source.resolve(), target.resolve()
    if source_path == target_path:
        raise ModelError(f"{target}: is {source} itself; give another name")
    if source_path in target_path.parents or target_path in source_path.parents:
        raise ModelError(f"{target}: overlaps {source}; write beside it")


def skipped_weights(model: StoredModel) -> list[str]:
    """Return the files of a model's folder with weights of other formats, which are not written."""
    if not model.is_folder:
        return []
    return sorted(
        str(path.relative_to(model.path))
        for path in model.path.rglob("*")
        if path.suffix in WEIGHTS and path not in (*model.shards, *model.readers)
    )


@dataclass(frozen=True)
class FolderFiles:
    """The files of a model's folder by what became of them in an output, as paths relative to the folder.

    Attributes:
        merged: files whose tensors the output has in files of its own.
        copied: files that the output has, with the bytes of the folder or with keys that were changed.
        left: files that the output does not have.
        differing: copied files that the folders of further models have with other bytes.
    """

    merged: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()


def list_files(model: StoredModel, others: Iterable[StoredModel], output: Path) -> FolderFiles:
    """Return what became of every file of a model's folder; nothing for a single file.

    Args:
        model: the model whose other files were copied.
        others: further models of the same command.
        output: the folder that was written.
    """
    if not model.is_folder:
        return FolderFiles()
    names = sorted(str(path.relative_to(model.path)) for path in model.path.rglob("*") if path.is_file())
    merged = [name for name in names if model.path / name in model.shards or name == INDEX]
    copied = [name for name in names if name not in merged and (output / name).is_file()]
    left = [name for name in names if name not in {*merged, *copied}]
    folders = [other.path for other in others if other.is_folder]
    differing = [name for name in copied if any(_differs(model.path / name, folder / name) for folder in folders)]
    return FolderFiles(tuple(merged), tuple(copied), tuple(left), tuple(differing))


def _differs(path: Path, twin: Path) -> bool:
    return twin.is_file() and not filecmp.cmp(path, twin, shallow=False)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path beside the target that replaces it on success, and is removed on failure."""
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
        for path in (part, old):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _weights_and_hidden(_folder: str, names: list[str]) -> list[str]:
    # Hidden folders hold version control and caches.
    endings = (*WEIGHTS, ".index.json")
    return [name for name in names if name.endswith(endings) or name.startswith(".")]


def _write_file(source: Path, target: Path, state: Mapping[str, Tensor], on_write: Callable[[int], None]) -> None:
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
                raise ModelError(
                    f"{target}: {name!r} has {len(content)} bytes instead of {stop - start}; keep its shape and dtype"
                )
            file.write(content)
            on_write(stop - start)
        # On disk before it takes the target's place: a crash must not leave an empty file there.
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
