"""The folder of a run: found or made before the first message, and held by one process at a time.

    runs/<run>/run.json        the app, its configuration, the number of rounds, and whether they are done
    runs/<run>/.lock           held while a process writes into the folder
    runs/<run>/observer-key    the secret by which an observer knows the run

A run whose process died goes on where it stopped as soon as the same app is started again with the same folder: its
record says that rounds are missing, and its lock is free.
"""

import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from flwr.app import Context
from flwr.serverapp import Grid

from fedbasin.server.run.resumption.checkpoint import REPORTS
from fedbasin.server.run.settings import NEW_RUN, Settings, SettingsError

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")

RECORD = "run.json"
LOCK = ".lock"
# What reading a damaged record may raise; nested too deeply, JSON ends in a RecursionError.
_UNREADABLE = (OSError, ValueError, TypeError, RecursionError)


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder knows it.

    Attributes:
        app: the app's name and publisher, or its model where it has none.
        rounds: number of rounds that the run has.
        configuration: the values that decide the result, by setting; those of the app have their own names.
        finished: whether all rounds are done.
        runs: Flower's ids of the runs that have worked in the folder, the last one last.
    """

    app: str
    rounds: int
    configuration: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = False
    runs: tuple[str, ...] = ()

    def difference(self, now: "RunRecord") -> str:
        """Return what another record has in place of this one's values; empty where they are equal."""
        past, present = ({"rounds": r.rounds, **r.configuration} for r in (self, now))
        return "; ".join(
            f"{key} was {past.get(key, 'unset')!r} and is {present.get(key, 'unset')!r}"
            for key in {**past, **present}
            if past.get(key) != present.get(key)
        )


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, held by this process.

    Attributes:
        path: the folder.
        record: the run as this process runs it.
        resumes: whether the folder has finished rounds, after which the run goes on.
    """

    path: Path
    record: RunRecord
    resumes: bool

    def write(self, *, finished: bool = False) -> None:
        """Write the record, in one step."""
        part = self.path / f"{RECORD}.part"
        part.write_text(json.dumps(asdict(replace(self.record, finished=finished)), indent=1), encoding="utf-8")
        part.replace(self.path / RECORD)


def run_id_of(context: Context | None, grid: Grid) -> str:
    """Return Flower's id of the run; the time where Flower gives none, as in a test's grid."""
    if context is not None:
        return str(context.run_id)
    try:
        return str(grid.run.run_id)
    except AttributeError:
        return time.strftime("run-%Y%m%d-%H%M%S")


def open_spool(folder: Path) -> BinaryIO:
    """Return an empty file for replies, in the folder of runs; it has no name, so that nothing of it can stay."""
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)


def app_of(grid: Grid) -> str:
    """Return the publisher and name of the app; empty where Flower gives none."""
    try:
        return str(grid.run.fab_id or "")
    except (AttributeError, NotImplementedError):
        return ""


@contextmanager
def open_run_folder(settings: Settings, run_id: str, record: RunRecord) -> Iterator[RunFolder]:
    """Choose the folder of a run and hold it: of the unfinished run that goes on, or a new one.

    Args:
        settings: the settings of the run.
        run_id: Flower's id of the run, which names a new folder.
        record: the run as it is configured now.

    Raises:
        SettingsError: the folder cannot be made or written, is held by another process, or has an unfinished run of
            another configuration.
    """
    if settings.resume not in ("", NEW_RUN):
        path, lock = Path(settings.resume), None
        if path.is_dir():
            lock = _held(path)
            if lock is None:
                raise SettingsError(
                    f"resume = '{path}': another process runs in this folder; wait for its end, or stop it first"
                )
        resumes = True
    else:
        resumed = None if settings.resume else _unfinished(settings.folder, record)
        path, lock = resumed or _new_folder(settings.folder, run_id)
        resumes = resumed is not None
    try:
        yield RunFolder(path, replace(record, runs=(*_earlier_runs(path), run_id)), resumes)
    finally:
        if lock is not None:
            lock.release()


def _unfinished(folder: Path, record: RunRecord) -> tuple[Path, FileLock] | None:
    """Return the newest unfinished run of the same app and configuration, held; None where there is none to go on with.

    Raises:
        SettingsError: there is one, of another configuration.
    """
    rival: tuple[Path, RunRecord] | None = None
    for path, earlier in _records(folder):
        is_open = earlier.app == record.app and not earlier.finished and _has_checkpoint(path)
        lock = _held(path) if is_open else None
        if lock is None:
            continue
        if not earlier.difference(record):
            return path, lock
        lock.release()
        rival = rival or (path, earlier)
    if rival is not None:
        path, earlier = rival
        raise SettingsError(
            f"{path} holds an unfinished run of this app with another configuration: {earlier.difference(record)}; "
            f"restore it to go on, or set resume = {NEW_RUN!r} to leave that run and start anew"
        )
    return None


def _has_checkpoint(folder: Path) -> bool:
    """Return whether a run has saved a model; what goes with it is written first, and may be all there is."""
    return any(folder.glob("global*.safetensors"))


def _records(folder: Path) -> list[tuple[Path, RunRecord]]:
    """Return the runs in a folder, the newest first; one without a record of this version is left out, by name."""
    runs = []
    # Not by their records alone: a run whose record is gone is to be named too.
    for path in sorted({file.parent for name in (RECORD, REPORTS) for file in folder.glob(f"*/{name}")}):
        try:
            runs.append(((path / RECORD).stat().st_mtime_ns, path, _read_record(path / RECORD)))
        except _UNREADABLE as error:
            if _has_checkpoint(path):
                _LOG.warning(
                    "%s cannot be read (%s), so that the run in its folder is left; resume = '%s' goes on with it",
                    path / RECORD,
                    error,
                    path,
                )
    return [(path, record) for _, path, record in sorted(runs, key=lambda run: run[:2], reverse=True)]


def _read_record(file: Path) -> RunRecord:
    """Read the record of a run; raises an error of `_UNREADABLE` where it is none of this version."""
    record = RunRecord(**json.loads(file.read_text(encoding="utf-8")))
    if not (isinstance(record.configuration, dict) and isinstance(record.rounds, int)):
        raise TypeError("its values are none of a run's")
    return record


def _earlier_runs(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(map(str, json.loads((folder / RECORD).read_text(encoding="utf-8"))["runs"]))
    except (*_UNREADABLE, LookupError):  # a new folder, or one of another version
        return ()


def _new_folder(folder: Path, run_id: str) -> tuple[Path, FileLock]:
    """Make a folder for a run, and hold it. Two runs of one id, as of two SuperLinks, never share one."""
    number = 1
    while True:
        path = folder / (run_id if number == 1 else f"{run_id}-{number}")
        check_writable(path)
        lock = _held(path)
        if lock is not None and not any(file.name != LOCK for file in path.iterdir()):
            return path, lock
        if lock is not None:
            lock.release()
        number += 1


def _held(folder: Path) -> FileLock | None:
    """Return the lock of a folder, held; None where another process, or another run in this one, holds it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        raise _unwritable(folder, error) from error
    return lock


def check_writable(folder: Path) -> None:
    """Make the folder of a run and check that files can be written there.

    Raises:
        SettingsError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> SettingsError:
    return SettingsError(f"folder = '{folder}': {error.strerror or error}; choose a folder that this process can write")


def read_run_key(folder: Path) -> str:
    """Return the secret by which an observer knows this run; it is made where the folder has none.

    It lies in the folder, so that a run that goes on there after a crash is still the same to the observer.

    Raises:
        SettingsError: the file cannot be read or made.
    """
    file = folder / "observer-key"
    try:
        if not file.exists():
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as secret_file:
                secret_file.write(secrets.token_hex(32))
        return file.read_text()
    except OSError as error:
        raise SettingsError(f"folder = '{folder}': the observer's key of the run: {error}") from error
