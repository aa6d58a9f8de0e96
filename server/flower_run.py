"""A run of a Flower app that is followed to its end: `flwr run` itself ends with 0 whatever became of the run."""

import json
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_STARTED = re.compile(r"Successfully started run (\d+)")
# Flower's words for a run whose ServerApp no longer says that it lives.
_LOST = "heartbeat"
_POLL_SECONDS = 3.0
_UNREACHABLE_SECONDS = 120.0


class FlowerRunError(RuntimeError):
    """A run that did not start, or did not complete."""


def run(app: Path, superlink: str, options: Sequence[str], resumes: int, say: Callable[[str], object]) -> None:
    """Run an app, pass its log on, and return where the run is completed.

    Args:
        app: folder of the app.
        superlink: name of the SuperLink's connection in Flower's configuration; empty for its default.
        options: further words of `flwr run`, such as `--run-config` and its value.
        resumes: how often a run whose process was lost is started again.
        say: takes each line of the log.

    Raises:
        FlowerRunError: the run did not start, failed, was stopped, or its SuperLink does not answer; with the reason.
    """
    where = [superlink] if superlink else []
    command = ["run", str(app), *where, "--stream", *options]
    for remaining in range(resumes, -1, -1):
        run_id = _follow(command, say)
        status, details = _await_end(run_id, where)
        if status == "finished:completed":
            return
        reason = f"run {run_id}: {status.removeprefix('finished:')}{details and f', {details}'}"
        if _LOST not in details.lower() or not remaining:
            raise FlowerRunError(f"{reason}; the log above has the error, and finished rounds are kept in its folder")
        say(f"{reason}; it is started again and goes on after its last finished round")


def flwr_output(*arguments: str) -> tuple[int, str]:
    """Run Flower's command line, and return its status and what it printed."""
    with _flwr(*arguments) as process:
        out = process.communicate()[0]
    return process.returncode, out


def read_listed_run(out: str) -> dict[str, str] | None:
    """Return the run that `flwr ls --run-id ID --format json` printed; None where it printed none."""
    try:
        run: dict[str, str] = json.loads(out)["runs"][0]
    except (ValueError, LookupError, TypeError):
        return None
    return run


def _follow(command: Sequence[str], say: Callable[[str], object]) -> str:
    """Start a run, pass its log on for as long as it comes, and return Flower's id of the run."""
    run_id = ""
    with _flwr(*command) as process:
        for line in process.stdout or ():
            say(line.rstrip("\n"))
            if match := _STARTED.search(line):
                run_id = match[1]
    if not run_id:
        raise FlowerRunError("the run did not start; the lines of `flwr run` above say why")
    return run_id


def _await_end(run_id: str, where: Sequence[str]) -> tuple[str, str]:
    """Wait until a run has ended, and return Flower's status and the details of it."""
    answered = time.monotonic()
    while time.monotonic() < answered + _UNREACHABLE_SECONDS:
        _, out = flwr_output("ls", *where, "--run-id", run_id, "--format", "json")
        if entry := read_listed_run(out):  # there is none while the SuperLink is being restarted
            if entry["status"].startswith("finished"):
                return entry["status"], entry.get("status-details", "")
            answered = time.monotonic()
        time.sleep(_POLL_SECONDS)
    raise FlowerRunError(
        f"run {run_id}: the SuperLink has not answered for {_UNREACHABLE_SECONDS:g} s; it last printed {out!r}"
    )


def _flwr(*arguments: str) -> "subprocess.Popen[str]":
    program = Path(sysconfig.get_path("scripts")) / "flwr"
    return subprocess.Popen(  # noqa: S603 - Flower's command line, without a shell
        [sys.executable, str(program), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
