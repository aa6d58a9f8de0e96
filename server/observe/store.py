"""Round reports on disk, in a SQLite database, so that an observer that restarts has its history.

The database holds what the history holds: a round that the history forgets is deleted, and its place is used again.
"""

import logging
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fedbasin.proto.report import ReportError, RoundReport
from fedbasin.server.observe.arrival import Arrival

FILE = "rounds.sqlite"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredReport:
    """A report on disk.

    Attributes:
        report: the report.
        holder: SHA-256 of the key of its run.
    """

    report: RoundReport
    holder: bytes


class Store:
    """A database of reports, open for this process alone.

    It may be used from several threads, one at a time.

    Raises:
        OSError: the folder cannot be made or written, or another observer has it open.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        try:
            self._database = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except sqlite3.Error:
                self._database.close()
                raise
        except sqlite3.Error as error:
            remedy = "another observer writes here" if "locked" in str(error) else "it cannot be used as a store"
            raise OSError(f"{self.path}: {error}; {remedy}, so give this one a folder of its own") from error

    def _open(self) -> None:
        # Exclusive, so that a second observer fails here and not in the middle of a run.
        for statement in (
            "PRAGMA locking_mode = EXCLUSIVE",
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = NORMAL",  # what was acknowledged survives the process, not a loss of power
            "BEGIN IMMEDIATE",
            "CREATE TABLE IF NOT EXISTS reports"
            " (run TEXT, round INTEGER, holder BLOB, report BLOB, PRIMARY KEY (run, round))",
            "COMMIT",
        ):
            self._database.execute(statement)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()

    def load(self) -> Iterator[StoredReport]:
        """Read the reports in the order in which they came.

        One that is not a report of this version is skipped with a warning, and stays.
        """
        rows = self._database.execute("SELECT run, round, holder, report FROM reports ORDER BY rowid")
        for run, number, holder, wire in rows:
            try:
                yield StoredReport(RoundReport.from_bytes(wire), holder)
            except ReportError as error:
                _log.warning("%s: run %r, round %d: skipped: %s", self.path, run, number, error)

    def append(self, arrival: Arrival, holder: bytes) -> None:
        """Write a report.

        Raises:
            OSError: the disk is full or gone; nothing of the report stays.
        """
        try:
            # The same run and round are there only where the history skipped them as of another version.
            row = (arrival.run.run_id, arrival.round, holder, arrival.wire)
            self._database.execute("INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: {error}") from error

    def forget(self, rounds: Iterable[tuple[str, int]]) -> None:
        """Delete reports by run and round.

        Raises:
            OSError: the disk is gone.
        """
        try:
            self._database.executemany("DELETE FROM reports WHERE run = ? AND round = ?", rounds)
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: {error}") from error
