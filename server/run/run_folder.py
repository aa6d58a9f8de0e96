"""The folder of a run, checked before the first message, and the id that names it."""

import os
import secrets
import tempfile
import time
from pathlib import Path

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


def read_run_key(folder: Path) -> str:
    """Return the secret by which an observer knows this run; it is made where the folder has none.

    It lies in the folder, so that a run that goes on there after a crash is still the same to the observer.

    Raises:
        SettingsError: the file cannot be read or made.
    """
    file = folder / "observer-key"
    try:
        if not file.exists():
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as made:
                made.write(secrets.token_hex(32))
        return file.read_text()
    except OSError as error:
        raise SettingsError(f"folder = '{folder}': the observer's key of the run: {error}") from error
