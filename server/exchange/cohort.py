"""The checked updates of a stage, kept until all clients have replied: what is ordinary shows only then.

Updates up to a bound are kept in memory, and the rest in one file each, so that memory does not grow with the number of
clients.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from fedbasin.strategies.fusion.update import Update

# Updates of small models never touch the disk.
_MOST_BYTES = 2**26


class Cohort:
    """The updates of a stage's clients, by node id."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        """Begin without clients.

        Args:
            most_bytes: bytes of tensors that are kept in memory.
        """
        self._most_bytes = most_bytes
        self._bytes = 0
        self._updates: dict[int, Update | Path] = {}
        self._folder: Path | None = None

    def __contains__(self, node: int) -> bool:
        return node in self._updates

    def __iter__(self) -> Iterator[int]:
        """Iterate over the nodes in the order of their ids, so that no sum depends on the order of arrival."""
        return iter(sorted(self._updates))

    def __getitem__(self, node: int) -> Update:
        """Return an update; tensors from a file are mapped, and read where they are used."""
        update = self._updates[node]
        if isinstance(update, Update):
            return update
        restored: Update = torch.load(update, mmap=True, weights_only=False)  # the file is this process's own
        return restored

    def keep(self, node: int, update: Update) -> None:
        """Keep the update of a client."""
        size = _nbytes(update)
        if self._bytes + size <= self._most_bytes:
            self._bytes += size
            self._updates[node] = update
            return
        path = self._spool / str(node)
        with _without_checksum():
            torch.save(update, path)
        self._updates[node] = path

    @property
    def _spool(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fedbasin-"))
            # Also where a stage ends by an error.
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder


@contextmanager
def _without_checksum() -> Iterator[None]:
    """Save without a checksum, which takes longer than the write: nobody else has the file."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _nbytes(update: Update) -> int:
    statistics = [
        tensor
        for precision in {id(p): p for p in update.precisions.values()}.values()
        for tensor in vars(precision).values()
        if isinstance(tensor, torch.Tensor)
    ]
    tensors = (*update.parameters.values(), *update.cross_moments.values(), *statistics)
    return sum(tensor.nbytes for tensor in tensors)
