"""The folder of a run, checked before the first message, and the id that names it."""

import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from flwr.app import Context
from flwr.serverapp import Grid

from fedbasin.server.run.settings import SettingsError


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
        raise SettingsError(
            f"folder = '{folder}': {error.strerror or error}; choose a folder that this process can write"
        ) from error
