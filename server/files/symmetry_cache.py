"""Symmetries that were discovered before, in files of the user's cache folder."""

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path


class SymmetryCache(MutableMapping[str, str]):
    """Notations by digest, one file each, in `$XDG_CACHE_HOME/fedbasin/symmetries`."""

    def __init__(self) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._folder = Path(home) / "fedbasin" / "symmetries"

    def __getitem__(self, digest: str) -> str:
        try:
            return self._path(digest).read_text(encoding="utf-8")
        except OSError as error:
            raise KeyError(digest) from error

    def __setitem__(self, digest: str, notation: str) -> None:
        part = self._folder / f".{digest}.{os.getpid()}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            part.write_text(notation, encoding="utf-8")
            part.replace(self._path(digest))
        except OSError:
            # A cache that cannot be written costs time, and nothing else.
            part.unlink(missing_ok=True)

    def __delitem__(self, digest: str) -> None:
        self._path(digest).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[str]:
        return (path.name for path in self._folder.glob("[!.]*"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, digest: str) -> Path:
        return self._folder / digest
