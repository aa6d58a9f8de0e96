"""The compose file on a real Docker engine, under a project name of its own."""

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx
import yaml

from tests.waiting import LONG, wait_until

ROOT = Path(__file__).parents[2]
SERVICES = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
OBSERVER = "reports:9470"
MOST_SECONDS = 1800.0  # the first build downloads gigabytes


@dataclass(frozen=True)
class Stack:
    """Services that are up and healthy.

    Attributes:
        project: Compose's name of them.
        prometheus_port: Prometheus' port on this machine.
        environment: of every `docker compose`.
    """

    project: str
    prometheus_port: int
    environment: Mapping[str, str] = field(repr=False)

    def compose(self, *arguments: str) -> str:
        done = self._start(arguments, stdout=subprocess.PIPE)
        output, _ = done.communicate(timeout=MOST_SECONDS)
        assert done.returncode == 0, output
        return output

    def run(self, **config: object) -> str:
        """Run the digits example with some settings of its own; returns its log."""
        return self.compose(*self._cli(config))

    def run_until(self, line: str, act: Callable[[], object], **config: object) -> tuple[int, str]:
        """Run the digits example, act once it has printed a line, and return its status and its log."""
        process = self._start(self._cli(config), stdout=subprocess.PIPE)
        log = list(_lines_until(process.stdout, line))
        act()
        rest, _ = process.communicate(timeout=MOST_SECONDS)
        return process.returncode, "".join(log) + rest

    def model(self, run: str) -> bytes:
        """Return the global model that a run has left, as a safetensors file."""
        command = ["run", "--rm", "-T", "cli", "fedbasin", "download", run, OBSERVER, "-o", "-"]
        done = self._start(command, stdout=subprocess.PIPE, text=False)
        return done.communicate(timeout=MOST_SECONDS)[0]

    def die(self, service: str) -> None:
        """Kill every process of a service from inside; `docker kill` would count as the user's word."""
        before = self._restarts(service)
        # Its own status tells nothing: the container may end before it.
        self._start(["exec", "-T", service, "python", "-c", _KILL_ALL]).wait(LONG)
        wait_until(lambda: self._restarts(service) > before, f"{service} is not restarted")

    def asked(self, query: str) -> list[Mapping[str, object]]:
        """Return what Prometheus answers."""
        address = f"http://127.0.0.1:{self.prometheus_port}/api/v1/query"
        return httpx.get(address, params={"query": query}, timeout=LONG).raise_for_status().json()["data"]["result"]

    def container(self, service: str) -> str:
        return self.compose("ps", "--quiet", service).strip()

    def memory(self, service: str) -> int:
        """Return the largest memory that a service has used so far, in bytes."""
        peak = ("/sys/fs/cgroup/memory.peak", "/sys/fs/cgroup/memory/memory.max_usage_in_bytes")
        read = f"import pathlib; print(max(int(p.read_text()) for p in map(pathlib.Path, {peak}) if p.is_file()))"
        return int(self.compose("exec", "-T", service, "python", "-c", read))

    def _restarts(self, service: str) -> int:
        return int(docker("inspect", "--format", "{{.RestartCount}}", self.container(service)))

    def _cli(self, config: Mapping[str, object]) -> list[str]:
        services = json.loads(self.compose("--profile", "cli", "config", "--format", "json"))["services"]
        words = services["cli"]["command"]
        settings = [f"{name}={value}" for name, value in config.items()]
        place = words.index("--run-config") + 1
        words[place] = " ".join([words[place], *settings])
        return ["run", "--rm", "-T", "cli", *words]

    def _start(self, arguments: list[str] | tuple[str, ...], *, text: bool = True, **streams: int) -> subprocess.Popen:
        command = ["docker", "compose", "-p", self.project, *arguments]
        return subprocess.Popen(command, cwd=ROOT / "deploy", env=self.environment, text=text, **streams)


# Every process but the first, which is the engine's `tini`, and this one; the service's own is then among them.
_KILL_ALL = "import os, signal; os.kill(-1, signal.SIGKILL)"


@contextmanager
def composed(**variables: object) -> Iterator[Stack]:
    """The services, up and healthy; nothing of them is left.

    Args:
        variables: environment variables of the compose file.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ports = {"PROMETHEUS": port, "PAGE": 0, "GRAFANA": 0, "PROXY": 0}  # 0: any that is free
    settings = {f"FEDBASIN_{name}_PORT": str(number) for name, number in ports.items()}
    settings |= {name: str(value) for name, value in variables.items()}
    stack = Stack(f"fedbasin-e2e-{os.getpid()}-{time.monotonic_ns()}", port, {**os.environ, **settings})
    try:
        stack.compose("up", "--build", "--wait", "--wait-timeout", "600")
        yield stack
    finally:
        stack.compose("--profile", "cli", "--profile", "alerts", "down", "--volumes", "--timeout", "10")


def number_of(log: str) -> str:
    """Return the number of the run that a log tells of."""
    found = re.search(r"started run (\d+)", log)
    assert found, log
    return found[1]


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=LONG)
    return done.stdout


def _lines_until(stream: IO[str], text: str) -> Iterator[str]:
    for line in stream:
        yield line
        if text in line:
            return
