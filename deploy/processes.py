"""Processes that end together, with everything that they started."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

SCRIPTS = Path(sysconfig.get_path("scripts"))

_MARK = "FEDBASIN_DEPLOYMENT"  # in the environment of every process of a deployment
_TAIL_LINES = 40
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class DeploymentError(RuntimeError):
    """A process of the deployment that did not start, or did not do its work."""


@dataclass(frozen=True)
class Process:
    """A started process, the leader of its own group, and the file that it logs to."""

    name: str
    handle: "subprocess.Popen[bytes]"
    log: Path

    def wait_for(self, pattern: str, deadline: float) -> str:
        """Wait until the log matches a pattern, and return the pattern's first group.

        Raises:
            DeploymentError: the process ended or took too long; with the end of its log.
        """
        while True:
            # Before the log is read: if the process has ended, the log then has its last words.
            ended = self.handle.poll() is not None
            text = strip_colour(self.log.read_text(errors="replace"))
            if match := re.search(pattern, text):
                return match[1]
            if ended or time.monotonic() >= deadline:
                state = f"ended with status {self.handle.returncode}" if ended else "takes too long"
                raise DeploymentError(
                    f"{self.name} {state}; the end of its log, {self.log}:\n{tail(text.splitlines())}"
                )
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill the process group, which is everything that a SuperNode starts."""
        # The id of a process that has ended may belong to a stranger by now.
        if self.handle.poll() is None:
            os.killpg(self.handle.pid, signal.SIGKILL)
        self.handle.wait()


class Processes:
    """The processes that were started for one deployment, and those that they started in turn."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        mark = uuid.uuid4().hex
        self._folder = folder
        self._environment = {**environment, _MARK: mark}
        self._entry = f"{_MARK}={mark}".encode()
        self._started: list[Process] = []

    def start(self, name: str, script: str, *arguments: str, **environment: str) -> Process:
        """Start one of Flower's scripts in a session of its own, with a log of that name."""
        log = self._folder / f"{name}.log"
        with log.open("wb") as out:
            handle = subprocess.Popen(  # noqa: S603 - our own command, without a shell
                [str(SCRIPTS / script), *arguments],
                cwd=self._folder,
                env={**self._environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(Process(name, handle, log))
        return self._started[-1]

    def flwr(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start Flower's command line with a pipe to read its output from."""
        return subprocess.Popen(  # noqa: S603 - our own command, without a shell
            [str(SCRIPTS / "flwr"), *arguments],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def kill(self, script: bytes = b"") -> int:
        """Kill the processes that run a script, or all of them, and return their number."""
        pids = self.pids(script)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def pids(self, script: bytes = b"") -> list[int]:
        """Return the processes that run a script, or all of them."""
        # Found by the mark in the environment and not by parentage: Flower's executors live in sessions of their own,
        # and outlive a killed parent by seconds, in which they can still start apps.
        return [pid for pid in _all_pids() if self._is_ours(pid) and script in _read_proc(pid, "cmdline")]

    def end(self, timeout_seconds: float = 10.0) -> None:
        """Kill until no process is left.

        Raises:
            DeploymentError: some processes do not end.
        """
        deadline = time.monotonic() + timeout_seconds
        for process in self._started:
            process.kill()
        while left := self.kill():
            if time.monotonic() >= deadline:
                raise DeploymentError(f"{left} processes of the deployment cannot be killed")
            time.sleep(0.02)

    def _is_ours(self, pid: int) -> bool:
        return self._entry in _read_proc(pid, "environ").split(b"\0")


def strip_colour(text: str) -> str:
    """Return text without the codes that colour it."""
    return _COLOUR.sub("", text)


def tail(lines: list[str]) -> str:
    """Return the last lines of a log."""
    return "\n".join(lines[-_TAIL_LINES:])


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM leave the block as an exit does, where this is entered in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    previous = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler's signature
    sys.exit(128 + signum)


def _all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _read_proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # the process has ended, or belongs to another user
        return b""
