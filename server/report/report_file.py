"""A run's folder as a report: HTML in one file, Markdown, or a line of JSON per round."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedbasin.server.report.document import report
from fedbasin.server.report.markdown import markdown
from fedbasin.server.report.reported_run import Run
from fedbasin.server.report.summary import as_json
from fedbasin.server.run.checkpoint import MODEL, REPORTS, read_reports


class NoRunError(ValueError):
    """A folder that has no run to report on; the message says what to give instead."""


def read(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        NoRunError: there is no such folder, or no round report in it, or reports of several runs.
    """
    if not folder.is_dir():
        raise NoRunError(f"{folder} is no folder; give a run's, such as runs/1234")
    try:
        reports = read_reports(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise NoRunError(f"{folder / REPORTS} cannot be read: {error}") from error
    if not reports:
        raise NoRunError(f"{folder} has no round report in {REPORTS}; {_hint(folder)}")
    runs = dict.fromkeys(one.run_id for one in reports)
    if len(runs) > 1 and not (folder / MODEL).is_file():
        raise NoRunError(
            f"{folder} has rounds of several runs ({', '.join(runs)}); give the folder of one, or look at an "
            "observer's store with `fedbasin observe --store`"
        )
    return Run.of(reports)


def html(folder: Path) -> str:
    """The report of a run as a document that needs nothing else.

    Raises:
        NoRunError: the folder has no run to report on.
    """
    return report(read(folder), _settings(folder))


def text(folder: Path) -> str:
    """The report of a run as Markdown.

    Raises:
        NoRunError: the folder has no run to report on.
    """
    return markdown(read(folder))


def lines(folder: Path) -> str:
    """The rounds of a run in brief, a JSON object per line.

    Raises:
        NoRunError: the folder has no run to report on.
    """
    return "".join(json.dumps(as_json(one), allow_nan=False) + "\n" for one in read(folder).rounds)


def write(folder: Path, target: Path, form: Callable[[Path], str]) -> None:
    """Makes a report and writes it.

    Raises:
        NoRunError: the folder has no run to report on.
        OSError: the target cannot be written.
    """
    target.write_text(form(folder), encoding="utf-8")


def _hint(folder: Path) -> str:
    """The runs inside a folder of runs: what one gives by mistake."""
    inside = sorted(path.parent for path in folder.glob(f"*/{REPORTS}"))
    return f"there are {', '.join(map(str, inside))}" if inside else "no round has ended yet"


def _settings(folder: Path) -> str:
    """What the checkpoint says of the run's settings; empty without one."""
    try:
        with safe_open(folder / MODEL, "np") as file:
            return (file.metadata() or {}).get("settings", "")
    except (OSError, SafetensorError):
        return ""
