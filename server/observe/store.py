"""Round reports on disk, one line of JSON each, so that an observer that restarts has its history.

A process that dies while it writes leaves a line without an end. Opening the store cuts it off; every line
before it is whole.
"""

import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from filelock import FileLock, Timeout

from fedbasin.proto.report import ReportError, RoundReport

FILE = "rounds.jsonl"
LOCK = ".lock"

_log = logging.getLogger(__name__)


class Store:
    """A file that only grows, open for this process alone.

    Raises:
        OSError: the folder cannot be made or written, or another observer has it open.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(
                errno.EWOULDBLOCK, "another observer writes here; give each a folder of its own", str(folder)
            ) from None
        # Unbuffered: what was acknowledged has left this process.
        self._file: BinaryIO = self.path.open("a+b", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.release()

    def load(self) -> Iterator[RoundReport]:
        """Read the report of every whole line.

        A line that is not a report of this version is skipped with a warning; half a line is cut off.
        """
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                _log.warning("%s:%d: half a line, cut off", self.path, number)
                self._file.truncate(whole)
                return
            whole += len(line)
            try:
                yield RoundReport.from_json(line)
            except ReportError as error:
                _log.warning("%s:%d: skipped: %s", self.path, number, error)

    def append(self, report: RoundReport) -> None:
        """Write a report.

        Raises:
            OSError: the disk is full or gone; nothing of the report stays in the file.
        """
        line = report.to_json().encode() + b"\n"
        end = self._file.seek(0, 2)
        # A raw write may be short without an error; the rest of the line would make the file unreadable.
        if self._file.write(line) != len(line):
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, "no room for a round report", str(self.path))
