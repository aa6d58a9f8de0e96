"""A real Flower deployment on this machine: one SuperLink and its SuperNodes, as processes on loopback.

It is meant for demonstrations, tests and benchmarks, and not for anything that must last: every process is killed at
the end, with everything that it started.
"""

import http
import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedbasin.deploy.processes import SCRIPTS, DeploymentError, Process, Processes, sigterm_as_exit, strip_colour, tail
from fedbasin.server.flower_run import read_listed_run

ConfigValue = bool | int | float | str


class RunFailedError(DeploymentError):
    """A run that did not complete."""


@dataclass(frozen=True)
class DeployedRun:
    """A finished run.

    Attributes:
        run_id: Flower's id of the run.
        status: Flower's status at the end, such as "finished:completed".
        seconds: time from the start of `flwr run` to the end of its log.
        serverapp_seconds: time that Flower counts, without the start of the command line.
        log: lines of the ServerApp's log, without colours.
    """

    run_id: int
    status: str
    seconds: float
    serverapp_seconds: float
    log: tuple[str, ...]


class Deployment:
    """A SuperLink and its SuperNodes, up and online.

    Attributes:
        folder: folder of the logs, one per process.
        address: host and port of the SuperLink.
        node_ids: Flower's ids of the nodes, by their index; a restarted node gets another.
    """

    def __init__(self, folder: Path, processes: Processes, node_configs: list[str], *, simulation: bool) -> None:
        self.folder = folder
        self.node_ids = [0] * len(node_configs)
        self._processes = processes
        self._node_configs = node_configs
        port, *self._node_ports = _free_ports(1 + len(node_configs))
        self.address = f"127.0.0.1:{port}"
        superlink = processes.start(
            "superlink",
            "flower-superlink",
            *("--insecure", "--port", str(port)),
            "--disable-runtime-dependency-installation",
            *(["--simulation"] if simulation else []),
        )
        # Without waiting for the SuperLink: SuperNodes try to reach it until they do.
        self._nodes = [self._start_node(index) for index in range(len(node_configs))]
        self._superlink = superlink

    def wait_until_online(self, timeout_seconds: float) -> None:
        """Wait for the SuperLink and then for each node.

        Raises:
            DeploymentError: a process died or took too long; with the end of its log.
        """
        deadline = time.monotonic() + timeout_seconds
        # The log comes before /health: on a port that the SuperLink did not get, another process might be healthy.
        self._superlink.wait_for(r"(Uvicorn running)", deadline)
        if (status := _health(self.address)) != http.HTTPStatus.OK:
            raise DeploymentError(f"the SuperLink at {self.address} answers /health with {status}")
        for index in range(len(self._nodes)):
            self._wait_for_node(index, deadline)

    def run(
        self,
        app: Path,
        config: Mapping[str, ConfigValue] | None = None,
        on_line: Callable[[str], object] | None = None,
        timeout_seconds: float = 600.0,
    ) -> DeployedRun:
        """Run a Flower app to its end.

        Args:
            app: folder with the app's pyproject.toml.
            config: values that replace those of the app's configuration.
            on_line: called with each line of the log as it comes.
            timeout_seconds: time after which the ServerApp is killed.

        Raises:
            RunFailedError: the run did not complete; with the end of its log.
        """
        start = time.monotonic()
        lines: list[str] = []
        with closing(self._follow(app, config or {}, timeout_seconds)) as log:
            for line in log:
                lines.append(line)
                if on_line:
                    on_line(line)
        seconds = time.monotonic() - start
        ending = f"the end of its log:\n{tail(lines)}\nAll logs are in {self.folder}"
        started = re.search(r"Successfully started run (\d+)", "\n".join(lines))
        # Flower says that a run started only in its log.
        if started is None:
            raise RunFailedError(f"{app} did not start; {ending}")
        if seconds >= timeout_seconds:
            raise RunFailedError(f"{app} took longer than {timeout_seconds:g} s; {ending}")
        run = self._read_status(started[1])
        if run["status"] != "finished:completed":
            raise RunFailedError(f"{app}: {run['status']}, {run['status-details']}; {ending}")
        elapsed = float(run["elapsed"])
        return DeployedRun(int(started[1]), run["status"], seconds, elapsed, tuple(lines))

    def kill_node(self, index: int) -> None:
        """Kill a SuperNode and all that it runs, as a power cut would."""
        self._nodes[index].kill()

    def restart_node(self, index: int, timeout_seconds: float = 60.0) -> None:
        """Start a SuperNode anew, killing it first if it still runs.

        Raises:
            DeploymentError: the node did not come online; with the end of its log.
        """
        self.kill_node(index)
        self._nodes[index] = self._start_node(index)
        self._wait_for_node(index, time.monotonic() + timeout_seconds)

    def kill_serverapps(self) -> int:
        """Kill the ServerApps that are running, and return their number.

        Flower takes a minute to notice, and then ends their runs as failed.
        """
        return self._processes.kill(b"flwr-serverapp")

    def _start_node(self, index: int) -> Process:
        return self._processes.start(
            f"supernode-{index}",
            "flower-supernode",
            *("--insecure", "--superlink", self.address, "--port", str(self._node_ports[index])),
            *("--node-config", self._node_configs[index]),
            OMP_NUM_THREADS="1",
            # A home for each node: nodes that share one install an app at once, and may import half of it.
            FLWR_HOME=str(self.folder / f"supernode-{index}"),
        )

    def _wait_for_node(self, index: int, deadline: float) -> None:
        self.node_ids[index] = int(self._nodes[index].wait_for(r"SuperNode ID: (\d+)", deadline))

    def _follow(self, app: Path, config: Mapping[str, ConfigValue], timeout_seconds: float) -> Generator[str]:
        """Yield the lines of `flwr run` as they come."""
        override = self.folder / "run-config.toml"
        # A file, because the command line cannot take a quote; JSON writes these types as TOML does.
        values = [f"{key} = {json.dumps(v, ensure_ascii=False)}\n" for key, v in config.items()]
        override.write_text("".join(values))
        arguments = ("run", str(app.resolve()), "--stream", "-c", str(override))
        with self._processes.flwr(*arguments) as command, _alarm(timeout_seconds, self._abort):
            try:
                for line in command.stdout or ():
                    yield strip_colour(line.rstrip("\n"))
            finally:
                command.kill()

    def _abort(self) -> None:
        self.kill_serverapps()
        self._processes.kill(b"--stream")

    def _read_status(self, run_id: str) -> dict[str, str]:
        # `flwr run` itself ends with status 0 even if the run failed.
        with self._processes.flwr("ls", "--run-id", run_id, "--format", "json") as command:
            out = command.communicate()[0]
        if run := read_listed_run(out):
            return run
        raise DeploymentError(f"'flwr ls' does not list run {run_id}; it printed:\n{out}")


@contextmanager
def deployment(
    nodes: int,
    node_config: Callable[[int], str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 120.0,
    *,
    simulation: bool = False,
) -> Iterator[Deployment]:
    """Run a deployment for as long as the block lasts; no process outlives the block.

    SIGTERM ends the block as Ctrl-C does, where this is entered in the main thread.

    Args:
        nodes: number of SuperNodes.
        node_config: returns the configuration of a node by its index: `key=value` pairs with spaces between.
        folder: folder for logs and state; made if missing.
        environment: variables added to the environment of every process.
        timeout_seconds: time within which all nodes must be online.
        simulation: run clients in Flower's simulation engine, which needs ray; then `nodes` is 0.

    Raises:
        DeploymentError: a process died or took too long; with the end of its log.
    """
    folder = folder.resolve()
    home = folder / "flwr"
    home.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, **_flower_environment(home, nodes), **(environment or {})}
    processes = Processes(folder, variables)
    with sigterm_as_exit():
        try:
            configs = [node_config(index) for index in range(nodes)]
            online = _bring_up(folder, processes, configs, timeout_seconds, simulation=simulation)
            _write_connection(home, online.address)
            yield online
        finally:
            processes.end()


def _bring_up(
    folder: Path, processes: Processes, node_configs: list[str], timeout_seconds: float, *, simulation: bool
) -> Deployment:
    try:
        online = Deployment(folder, processes, node_configs, simulation=simulation)
        online.wait_until_online(timeout_seconds)
    except DeploymentError as error:
        # Another process may take a port between our finding it free and using it; hardly twice.
        if "address already in use" not in str(error):
            raise
        processes.end()
        online = Deployment(folder, processes, node_configs, simulation=simulation)
        online.wait_until_online(timeout_seconds)
    return online


def _flower_environment(home: Path, nodes: int) -> dict[str, str]:
    # All together look for work 25 times a second: more polling would take the processor from the work.
    poll_seconds = min((nodes + 1) / 25, 1.0)
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll_seconds),
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }


def _write_connection(home: Path, address: str) -> None:
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "deployment"\n\n[superlink.deployment]\naddress = "{address}"\ninsecure = true\n'
    )


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:  # all are open at once, so that no two get the same port
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def _health(address: str) -> int:
    with closing(http.client.HTTPConnection(address, timeout=5)) as connection:
        connection.request("GET", "/health")
        return connection.getresponse().status


@contextmanager
def _alarm(seconds: float, ring: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(seconds, ring)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
