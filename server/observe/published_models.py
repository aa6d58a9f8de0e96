"""The global models that an observer can hand out: run folders in one folder that it can see.

A run keeps the model of its last finished round only, and replaces the file in one step. What was opened stays
complete, so a download that a new round overtakes ends with the model that it began with.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from anyio import CapacityLimiter, to_thread

from fedbasin.proto.observer_service import ModelChunk

# The name that fedbasin.server.run.resumption.checkpoint uses; importing it would bring torch.
FILE = "global.safetensors"
_RECORD = "run.json"  # as in fedbasin.server.run.resumption.run_folder
_CHUNK_BYTES = 2**20
_LONGEST_HEADER_BYTES = 16 * 2**20  # some 100 000 tensors
_MOST_DOWNLOADS = 16


class NoModelError(LookupError):
    """A run or a round without a model; the message says which models there are."""


class BusyError(RuntimeError):
    """A download beyond those that there may be at once."""


@dataclass
class PublishedModels:
    """The global models of the runs in a folder.

    Files are opened and read on threads of their own: a slow disk holds up nothing but downloads.

    Attributes:
        folder: folder of the run folders; None publishes nothing.
    """

    folder: Path | None = None
    _threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(4))
    _downloads: int = 0

    async def read_chunks(self, run_id: str, server_round: int) -> AsyncGenerator[ModelChunk, None]:
        """Yield the model of a run in pieces, with the digest of the whole file in the last.

        Args:
            run_id: name of the run's folder, or the id of a run that was resumed there.
            server_round: round of the model; 0 takes whichever is kept.

        Raises:
            NoModelError: there is no such model.
            BusyError: as many downloads as there may be are under way.
            OSError: the disk fails.
        """
        if self._downloads >= _MOST_DOWNLOADS:
            raise BusyError(f"{self._downloads} downloads are under way, as many as there may be; try again later")
        self._downloads += 1
        opening = asyncio.ensure_future(to_thread.run_sync(self._open, run_id, limiter=self._threads))
        try:
            # Shielded: a caller that goes meanwhile would leave nobody to close what the thread opens.
            file = await asyncio.shield(opening)
            async with aclosing(self._chunks(file, run_id, server_round)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            opening.add_done_callback(_close)
            self._downloads -= 1

    async def _chunks(self, file: BinaryIO, run_id: str, server_round: int) -> AsyncGenerator[ModelChunk, None]:
        model_round = await to_thread.run_sync(_read_round, file, run_id, limiter=self._threads)
        if server_round not in (0, model_round):
            raise NoModelError(
                f"run '{run_id}' keeps the model of round {model_round} and not of round {server_round}; "
                "ask for round 0 to get whichever is kept"
            )
        total, digest, offset = os.fstat(file.fileno()).st_size, hashlib.sha256(), 0
        while offset < total:
            data = await to_thread.run_sync(_read_piece, file, digest, limiter=self._threads)
            if not data:
                raise OSError(f"the model of run '{run_id}' ends early, at byte {offset} of {total}")
            end = offset + len(data)
            sha256 = digest.digest() if end >= total else b""
            yield ModelChunk(offset, data, total, model_round, sha256)
            offset = end

    def _open(self, run_id: str) -> BinaryIO:
        """Open the model of a run.

        Only names that the folder lists become part of a path, and links are not followed, so that no name leads out
        of the folder.
        """
        if self.folder is None:
            raise NoModelError("this observer hands out no models; start it with --models and the folder of the runs")
        listed = sorted(e.name for e in self.folder.iterdir() if e.is_dir() and not e.is_symlink())
        names = [run_id] if run_id in listed else [e for e in listed if run_id in _read_runs(self.folder / e)]
        if not names:
            raise NoModelError(f"no run '{run_id}' here; there are: {', '.join(listed) or 'none'}")
        try:
            # O_NOFOLLOW: a link in place of the model could lead out of the folder.
            descriptor = os.open(self.folder / names[0] / FILE, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise NoModelError(f"run '{run_id}' has no model yet; its first round is under way") from error
        return os.fdopen(descriptor, "rb")


def _read_runs(folder: Path) -> list[str]:
    """Return the ids of the runs that have worked in a folder, those that were resumed there too."""
    try:
        return list(map(str, json.loads((folder / _RECORD).read_text())["runs"]))
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _close(opening: "asyncio.Future[BinaryIO]") -> None:
    if not opening.cancelled() and not opening.exception():
        opening.result().close()


def _read_piece(file: BinaryIO, digest: "hashlib._Hash") -> bytes:
    data = file.read(_CHUNK_BYTES)
    digest.update(data)
    return data


def _read_round(file: BinaryIO, run_id: str) -> int:
    """Return the round in a safetensors file's metadata, and leave the file at its start."""
    try:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, _LONGEST_HEADER_BYTES)))
        file.seek(0)
        return int(header["__metadata__"]["round"])
    except (ValueError, KeyError, TypeError) as error:
        raise NoModelError(f"the model of run '{run_id}' names no round; fedbasin did not write it") from error
