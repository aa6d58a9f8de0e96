"""The file of results: one JSON line for each round of each setting, only ever added to."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from tests.protocol.setting import Point, Setting, as_row, from_row

Curves: TypeAlias = dict[Setting, dict[int, Point]]


class ResultsError(ValueError):
    """A file that cannot be read on from."""


def read(file: Path) -> Curves:
    """Every curve in a file, points by round; none if there is no file.

    A curve that was measured again begins anew: its later lines replace the earlier.

    Raises:
        ResultsError: a line is damaged, or is of another version of the protocol.
    """
    curves: Curves = defaultdict(dict)
    lines = file.read_text().splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            setting, point = from_row(json.loads(line))
        except ValueError as error:
            raise ResultsError(
                f"{file}, line {number}: {error}; move the file away, or give another with --results"
            ) from error
        if point.round <= max(curves[setting], default=-1):
            curves[setting].clear()
        curves[setting][point.round] = point
    return dict(curves)


def add(file: Path, setting: Setting, points: Iterable[Point]) -> None:
    """Write points at the end, in one piece."""
    text = "".join(json.dumps(as_row(setting, point)) + "\n" for point in points)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as end:
        end.write(text)
