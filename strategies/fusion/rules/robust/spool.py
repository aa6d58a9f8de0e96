"""A spool: tensors of many clients in one file, which are read back piece by piece in bounded memory."""

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


class Spool:
    """Tensors in a file, which is closed when the spool is no longer used."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = 0
        weakref.finalize(self, file.close)

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
                f"a client's reply cannot be kept on disk for the robust rule ({error.strerror}); free space where "
                "the run's folder lies, choose another fedbasin.folder, or ask fewer clients (fedbasin.fraction-train)",
            ) from error
        self._end += tensor.nbytes
        return place

    def read(self, place: SpoolEntry) -> Tensor:
        """Return a tensor."""
        return self._entries(place, 0, math.prod(place.shape)).view(place.shape)

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
