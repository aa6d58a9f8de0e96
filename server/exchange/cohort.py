"""The checked updates of a stage, kept until all clients have replied: what is ordinary shows only then.

Updates up to a bound are kept in memory, and the rest in one file, so that memory does not grow with the number of
clients.
"""

import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from fedbasin.strategies.fusion.spool import Spool, SpoolEntry, SpoolFiles
from fedbasin.strategies.fusion.update import Update

# Updates of small models never touch the disk.
_MOST_BYTES = 2**26


class Cohort:
    """The updates of a stage's clients, by node id."""

    def __init__(self, files: SpoolFiles, most_bytes: int = _MOST_BYTES) -> None:
        """Begin without clients.

        Args:
            files: where updates are kept that do not stay in memory.
            most_bytes: bytes of tensors that are kept in memory.
        """
        self._files = files
        self._most_bytes = most_bytes
        self._bytes = 0
        self._updates: dict[int, Callable[[], Update]] = {}
        self._spool: Spool | None = None

    def __contains__(self, node: int) -> bool:
        return node in self._updates

    def __iter__(self) -> Iterator[int]:
        """Iterate over the nodes in the order of their ids, so that no sum depends on the order of arrival."""
        return iter(sorted(self._updates))

    def __getitem__(self, node: int) -> Update:
        """Return an update; tensors of a file are mapped, and read where they are used."""
        return self._updates[node]()

    def keep(self, node: int, update: Update) -> None:
        """Keep the update of a client.

        Raises:
            SpoolError: the disk is full.
        """
        size = _nbytes(update)
        if self._bytes + size <= self._most_bytes:
            self._bytes += size
            self._updates[node] = lambda: update
            return
        if self._spool is None:
            self._spool = self._files.open()
        self._updates[node] = partial(_restored, _Writer(self._spool).dump_all(update), self._spool)


def _restored(pickled: bytes, spool: Spool) -> Update:
    update: Update = _Reader(pickled, spool).load()
    return update


class _Writer(pickle.Pickler):
    """Pickles an update, and its tensors into a spool: each once, however many layers share it."""

    def __init__(self, spool: Spool) -> None:
        self._bytes = io.BytesIO()
        super().__init__(self._bytes, protocol=pickle.HIGHEST_PROTOCOL)
        self._spool = spool
        self._places: dict[int, SpoolEntry] = {}

    def persistent_id(self, value: object) -> SpoolEntry | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._places:
            self._places[id(value)] = self._spool.write(value)
        return self._places[id(value)]

    def dump_all(self, update: Update) -> bytes:
        self.dump(update)
        return self._bytes.getvalue()


class _Reader(pickle.Unpickler):
    """Reads what `_Writer` has written in this process."""

    def __init__(self, pickled: bytes, spool: Spool) -> None:
        super().__init__(io.BytesIO(pickled))
        self._spool = spool
        self._tensors: dict[SpoolEntry, Tensor] = {}

    def persistent_load(self, place: SpoolEntry) -> Tensor:
        if place not in self._tensors:
            self._tensors[place] = self._spool.read(place)
        return self._tensors[place]


def _nbytes(update: Update) -> int:
    statistics = [
        tensor
        for precision in {id(p): p for p in update.precisions.values()}.values()
        for tensor in vars(precision).values()
        if isinstance(tensor, Tensor)
    ]
    tensors = (*update.parameters.values(), *update.cross_moments.values(), *statistics)
    return sum(tensor.nbytes for tensor in tensors)
