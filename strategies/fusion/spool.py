"""A spool: tensors of many clients in one file, which are read back piece by piece in bounded memory."""

import math
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import BinaryIO

import torch
from torch import Tensor

# Entries of all clients together that are in memory at a time.
_PIECE = 2**21


class SpoolError(OSError):
    """Replies that cannot be written to disk or read back, as where the disk is full."""


@dataclass(frozen=True)
class SpoolEntry:
    """The place of a tensor in a spool.

    Attributes:
        offset: number of bytes before it.
        dtype: element type.
        shape: shape of the tensor.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SpoolFiles:
    """Files for the spools of a run, one spool after the other.

    A file is used again as soon as its spool and all tensors that were read from it are gone: pages that a file has
    already cost a tenth of new ones.
    """

    def __init__(self, make: Callable[[], BinaryIO] = TemporaryFile) -> None:
        """Begin without files.

        Args:
            make: opens an empty file without a name, for writing and reading.
        """
        self._make = make
        self._free: list[BinaryIO] = []
        weakref.finalize(self, _close, self._free)

    def open(self) -> "Spool":
        """Return an empty spool."""
        file = self._free.pop() if self._free else self._make()
        return Spool(file, lambda: self._free.append(file))


class Spool:
    """Tensors in a file."""

    def __init__(self, file: BinaryIO, release: Callable[[], object] | None = None) -> None:
        """Begin without tensors.

        Args:
            file: a file of the system, for writing and reading; what it holds is overwritten.
            release: called when neither the spool nor a tensor that was read from it exists; closes the file if None.
        """
        self._file = file
        self._end = 0
        weakref.finalize(self, release or file.close)

    def write(self, tensor: Tensor) -> SpoolEntry:
        """Append a tensor.

        Raises:
            SpoolError: the file cannot be written.
        """
        place = SpoolEntry(self._end, tensor.dtype, tuple(tensor.shape))
        try:
            self._file.seek(self._end)
            self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise SpoolError(
                error.errno,
                f"a client's reply cannot be kept on disk ({error.strerror}); free space where the run's folder lies, "
                "choose another fedbasin.folder, or ask fewer clients (fedbasin.fraction-train)",
            ) from error
        self._end += -(-tensor.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return place

    def read(self, place: SpoolEntry) -> Tensor:
        """Return a tensor, which is read from the file where it is used."""
        size = math.prod(place.shape)
        if not size:
            return torch.empty(place.shape, dtype=place.dtype)
        length = size * place.dtype.itemsize
        mapping = _Mapping(self._file.fileno(), length, access=mmap.ACCESS_COPY, offset=place.offset)
        mapping.spool = self
        return torch.frombuffer(mapping, dtype=place.dtype).view(place.shape)

    def pieces(self, places: Sequence[SpoolEntry]) -> Iterator[tuple[slice, Tensor]]:
        """Yield pieces of tensors of one shape: the entries' range, and the entries `[tensor, entry]`."""
        length = max(1, _PIECE // len(places))
        entries = math.prod(places[0].shape)
        for start in range(0, entries, length):
            stop = min(start + length, entries)
            yield slice(start, stop), torch.stack([self._entries(place, start, stop) for place in places])

    def _entries(self, place: SpoolEntry, start: int, stop: int) -> Tensor:
        buffer = bytearray((stop - start) * place.dtype.itemsize)
        self._file.seek(place.offset + start * place.dtype.itemsize)
        if self._file.readinto(buffer) < len(buffer):  # type: ignore[attr-defined]
            raise SpoolError("a client's reply on disk is cut off; nothing but this run may write in its folder")
        return torch.frombuffer(buffer, dtype=place.dtype) if buffer else torch.empty(0, dtype=place.dtype)


def _close(files: Sequence[BinaryIO]) -> None:
    for file in files:
        file.close()


class _Mapping(mmap.mmap):
    """A part of a spool's file in memory, which keeps the spool for as long as a tensor has it."""

    spool: Spool
