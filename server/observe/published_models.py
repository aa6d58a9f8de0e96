"""The global models that an observer can hand out: run folders in one folder that it can see.

A run keeps the model of its last finished round only, and replaces the file in one step. What was opened stays
whole, so a download that a new round overtakes ends with the model that it began with.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedbasin.proto.fedbasin_pb2 import ModelChunk

FILE = "global.safetensors"  # as fedbasin.server.run.checkpoint writes it, which would bring torch
_CHUNK_BYTES = 2**20
_LONGEST_HEADER_BYTES = 100 * 2**20  # safetensors' own limit


class NoModelError(LookupError):
    """There is no such run, or no model of that round; the message says what there is."""


@dataclass(frozen=True)
class Models:
    """Run folders, each with a name of its own.

    Attributes:
        folder: the one that they are in; None hands out nothing.
    """

    folder: Path | None = None

    async def read(self, run_id: str, wanted_round: int) -> AsyncIterator[ModelChunk]:
        """A run's model in pieces, with the digest of the whole in the last.

        Args:
            run_id: name of the run's folder.
            wanted_round: which round's model; 0 takes what is there.

        Raises:
            NoModelError: there is none.
            OSError: the disk fails.
        """
        with ExitStack() as stack:
            file = stack.enter_context(self._open(run_id))
            kept = _round_of(file, run_id)
            if wanted_round not in (0, kept):
                raise NoModelError(
                    f"run '{run_id}' keeps the model of round {kept} and not of round {wanted_round}; "
                    "ask for round 0 to get whichever is kept"
                )
            total, digest, offset = os.fstat(file.fileno()).st_size, hashlib.sha256(), 0
            while offset < total:
                data = await asyncio.to_thread(_next_piece, file, digest)
                if not data:
                    raise OSError(
                        f"the model of run '{run_id}' ends early, at byte {offset} of {total}"
                    )
                chunk = ModelChunk(offset=offset, data=data, total_bytes=total, round=kept)
                offset += len(data)
                if offset >= total:
                    chunk.sha256 = digest.digest()
                yield chunk

    def _open(self, run_id: str) -> BinaryIO:
        """Opens a model; only names that the folder lists are ever part of a path, and links are not followed."""
        if self.folder is None:
            raise NoModelError(
                "this observer hands out no models; start it with --models and the folder of the runs"
            )
        listed = {e.name for e in self.folder.iterdir() if e.is_dir() and not e.is_symlink()}
        if run_id not in listed:
            raise NoModelError(
                f"no run '{run_id}' here; there are: {', '.join(sorted(listed)) or 'none'}"
            )
        try:
            found = os.open(self.folder / run_id / FILE, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise NoModelError(
                f"run '{run_id}' has no model yet; its first round is under way"
            ) from error
        return os.fdopen(found, "rb")


def _next_piece(file: BinaryIO, digest: "hashlib._Hash") -> bytes:
    data = file.read(_CHUNK_BYTES)
    digest.update(data)
    return data


def _round_of(file: BinaryIO, run_id: str) -> int:
    """The round in a safetensors file's metadata; leaves the file at its start."""
    try:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, _LONGEST_HEADER_BYTES)))
        file.seek(0)
        return int(header["__metadata__"]["round"])
    except (ValueError, KeyError, TypeError) as error:
        raise NoModelError(
            f"the model of run '{run_id}' names no round; fedbasin did not write it"
        ) from error
