"""The report of a run's folder: HTML in one file, Markdown, or a line of JSON per round."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedbasin.server.report.document import render_report
from fedbasin.server.report.markdown import render_markdown
from fedbasin.server.report.reported_run import ReportedRun
from fedbasin.server.report.summary import summary_to_json
from fedbasin.server.run.resumption.checkpoint import MODEL, REPORTS, read_lines


class NoRunError(ValueError):
    """A folder without a run to report on; the message says what to give instead."""


def read_run(folder: Path) -> ReportedRun:
    """Read the run in a folder.

    Raises:
        NoRunError: there is no such folder, or no round report in it, or reports of several runs.
    """
    if not folder.is_dir():
        raise NoRunError(f"{folder} is not a folder; give the folder of a run, such as runs/1234")
    try:
        reports, unread = read_lines(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise NoRunError(f"{folder / REPORTS} cannot be read: {error}") from error
    if unread and not reports:
        raise NoRunError(f"{folder / REPORTS} has {len(unread)} lines, and none is a round report: {unread[0]}")
    if not reports:
        raise NoRunError(f"{folder} has no round report in {REPORTS}; {_hint(folder)}")
    names = dict.fromkeys(report.run_id for report in reports)
    # A resumed run has another id, but the folder of a run holds its model; the store of an observer does not.
    if len(names) > 1 and not (folder / MODEL).is_file():
        raise NoRunError(
            f"{folder} has rounds of several runs ({', '.join(names)}); give the folder of one, or look at an "
            "observer's store with `fedbasin observe --store`"
        )
    return ReportedRun.from_reports(reports)


def folder_to_html(folder: Path) -> str:
    """Return the report of a run as an HTML document that needs nothing else.

    Raises:
        NoRunError: the folder has no run to report on.
    """
    return render_report(read_run(folder), _read_settings(folder))


def folder_to_markdown(folder: Path) -> str:
    """Return the report of a run as Markdown.

    Raises:
        NoRunError: the folder has no run to report on.
    """
    return render_markdown(read_run(folder))


def folder_to_json_lines(folder: Path) -> str:
    """Return the rounds of a run in brief, a JSON object per line.

    Raises:
        NoRunError: the folder has no run to report on.
    """
    rounds = read_run(folder).rounds
    return "".join(json.dumps(summary_to_json(r), allow_nan=False) + "\n" for r in rounds)


def find_damage(folder: Path) -> str:
    """Return what is wrong with lines of the reports that are left out; empty where all are read."""
    unread = read_lines(folder)[1]
    return f"{folder / REPORTS}: {len(unread)} lines are left out, the first is {unread[0]}" if unread else ""


def _hint(folder: Path) -> str:
    """Name the runs inside, for a reader who gave the folder of all runs by mistake."""
    inside = sorted(path.parent for path in folder.glob(f"*/{REPORTS}"))
    return f"there are {', '.join(map(str, inside))}" if inside else "no round has ended yet"


def _read_settings(folder: Path) -> str:
    """Return the settings that the checkpoint holds, as JSON; empty without a checkpoint."""
    try:
        with safe_open(folder / MODEL, "np") as file:
            return (file.metadata() or {}).get("settings", "")
    except (OSError, SafetensorError):
        return ""
