"""The files of a merged model: headers and offsets are fixed by the plan, so tensors can be written in any order."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from fedbasin.server.files.merge.plan import PlannedTensor
from fedbasin.server.files.reading import INDEX, SINGLE

# Names of dtypes in the headers of safetensors files.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file: its name, its header, and the place of each tensor in it, in bytes."""

    name: str
    header: bytes
    places: Mapping[str, int]


def plan_files(plan: Sequence[PlannedTensor], metadata: Mapping[str, str], limit: int | None) -> list[PlannedFile]:
    """Distribute tensors over files.

    Args:
        plan: the tensors.
        metadata: metadata of every file.
        limit: largest number of bytes in a file, unless one tensor alone is larger; None writes one file.
    """
    shards: list[list[PlannedTensor]] = [[]]
    for tensor in plan:
        if limit is not None and shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return [_plan_file(SINGLE, shards[0], metadata)]
    names = (f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1))
    return [_plan_file(name, shard, metadata) for name, shard in zip(names, shards, strict=True)]


def write_index(files: Sequence[PlannedFile], total: int, folder: Path) -> None:
    """Write the index of a model in several files; one file needs none."""
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in file.places}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")


class TensorWriter:
    """Open files of a merged model, which threads write tensors into; they are on disk when the context ends."""

    def __init__(self, files: Iterable[PlannedFile], paths: Iterable[Path]) -> None:
        self._stack = ExitStack()
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        for file, path in zip(files, paths, strict=True):
            stream = self._stack.enter_context(path.open("xb"))
            stream.write(file.header)
            stream.flush()
            self._places |= {name: (stream, place) for name, place in file.places.items()}

    def __enter__(self) -> Self:
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place."""
        stream, place = self._places[name]
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        # The system may take fewer bytes than it is given: at most 2 GiB at a time.
        while content:
            written = os.pwrite(stream.fileno(), content, place)
            content, place = content[written:], place + written

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                for stream in {stream for stream, _ in self._places.values()}:
                    os.fsync(stream.fileno())


def _plan_file(name: str, tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> PlannedFile:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    starts: dict[str, int] = {}
    end = 0
    # Wide dtypes first, so that every tensor is aligned to its dtype.
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
        starts[tensor.name] = end
        end += tensor.nbytes
        entries[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (starts[tensor.name], end),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return PlannedFile(name, header, {name: len(header) + start for name, start in starts.items()})
