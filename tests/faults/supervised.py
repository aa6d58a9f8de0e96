"""A deployment whose processes are started again when they die, as by a container's restart policy, and a killer.

SuperLink (with a database), SuperExec, SuperNodes and the observer are supervised. A run whose ServerApp died is
submitted again, with the same configuration: that it goes on where it stopped is what is tested.
"""

import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from fedbasin.deploy.local import _flower_environment, _free_ports, _write_connection
from fedbasin.deploy.processes import DeploymentError, Processes

OBSERVED = "observed"  # the observer's store, which tells its process from others
KINDS = ("flwr-serverapp", "flower-superexec", "flower-supernode", "flwr-clientapp", "flower-superlink", OBSERVED)


class Supervised:
    """Processes that are kept alive.

    Attributes:
        kills: the kinds that were killed, in their order, where there was a process to kill.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder.resolve()
        home = self.folder / "flwr"
        home.mkdir(parents=True)
        self.processes = Processes(
            self.folder, os.environ | _flower_environment(home, nodes) | {"OMP_NUM_THREADS": "1"}
        )
        port, observer, metrics, *node_ports = _free_ports(3 + nodes)
        self.observer = f"127.0.0.1:{observer}"
        address = f"127.0.0.1:{port}"
        _write_connection(home, address)
        self._commands = {
            "superlink": (
                "flower-superlink",
                *("--insecure", "--port", str(port), "--isolation", "process"),
                *("--database", str(self.folder / "state.db")),
            ),
            "superexec": ("flower-superexec", "--insecure", "--runtime-api-address", address),
            "observer": (
                "fedbasin",
                *("observe", "--port", str(observer), "--metrics-port", str(metrics)),
                *("--store", str(self.folder / OBSERVED)),
            ),
        }
        for index, node_port in enumerate(node_ports):
            self._commands[f"supernode-{index}"] = (
                "flower-supernode",
                *("--insecure", "--superlink", address, "--port", str(node_port)),
                *("--node-config", f"partition-id={index}", "--isolation", "process"),
            )
            # Flower's SuperNode does not miss a SuperExec that it started itself; a supervisor does.
            self._commands[f"superexec-{index}"] = (
                "flower-superexec",
                *("--insecure", "--runtime-api-address", f"127.0.0.1:{node_port}"),
            )
        self._alive = {}
        self.kills: list[str] = []
        self._ending = threading.Event()
        self._restart()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _restart(self) -> None:
        for name, command in self._commands.items():
            process = self._alive.get(name)
            if process is None or process.handle.poll() is not None:
                home = self.folder / name
                home.mkdir(exist_ok=True)
                number = len(list(self.folder.glob(f"{name}.*.log")))
                self._alive[name] = self.processes.start(f"{name}.{number}", *command, FLWR_HOME=str(home))

    def _keep(self) -> None:
        while not self._ending.wait(0.5):
            for name, process in self._alive.items():
                if name.startswith("supernode") and _hangs(process.log):
                    process.kill()
            self._restart()

    def kill(self, kind: str) -> bool:
        """Kill one process of a kind; return whether there was any."""
        pids = [pid for pid in self.processes.pids(kind.encode()) if pid != os.getpid()]
        if not pids:
            return False
        pid = random.choice(pids)
        with suppress(ProcessLookupError):
            if kind == "flower-supernode":
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
        self.kills.append(kind)
        return True

    def run(self, app: Path, config: dict, is_done, timeout_seconds: float) -> float:
        """Submit a run, again where its ServerApp is gone, until it is done; return the seconds that it took.

        Raises:
            DeploymentError: it was not done in time.
        """
        started = time.monotonic()
        override = self.folder / "run-config.toml"
        override.write_text("".join(f"{key} = {value!r}\n".replace("'", '"') for key, value in config.items()))
        while not is_done():
            self._submit(app, override, is_done, started + timeout_seconds)
            if time.monotonic() - started > timeout_seconds:
                raise DeploymentError(f"the run was not done within {timeout_seconds:g} s; logs are in {self.folder}")
        return time.monotonic() - started

    def _submit(self, app: Path, override: Path, is_done, deadline: float) -> None:
        """Submit the run once, and return when its ServerApp is gone, or never came."""
        with self.processes.flwr("run", str(app.resolve()), "-c", str(override)) as command:
            out = command.communicate()[0]
        if "Successfully started run" not in out:
            time.sleep(1)
            return
        came = False
        patience = time.monotonic() + 90
        while not is_done() and time.monotonic() < deadline:
            alive = bool(self.processes.pids(b"flwr-serverapp"))
            if (came and not alive) or (not came and time.monotonic() > patience):
                return
            came = came or alive
            time.sleep(0.5)

    def end(self) -> None:
        self._ending.set()
        self._keeper.join()
        self.processes.end()


def _hangs(log: Path) -> bool:
    """Return whether a SuperNode waits for the arrays of a ClientApp that died while it handed its reply over.

    Flower's SuperNode then waits for ever, and stays online (flwr 1.42, `yield_object_contents`).
    """
    lines = log.read_text(errors="replace").rstrip().splitlines() or [""]
    return "Sending:" in lines[-1] and time.time() - log.stat().st_mtime > 60


@contextmanager
def supervised(folder: Path, nodes: int):
    """Keep a deployment alive for as long as the block lasts; no process outlives the block."""
    made = Supervised(folder, nodes)
    try:
        yield made
    finally:
        made.end()


class Killer(threading.Thread):
    """Kills a process of a random kind at random moments, from a seed, until it is stopped."""

    def __init__(self, deployment: Supervised, seed: int, most: int, seconds: tuple[float, float]) -> None:
        super().__init__(daemon=True)
        self._deployment = deployment
        self._draw = random.Random(seed)
        self._most = most
        self._seconds = seconds
        self.stopped = threading.Event()

    def run(self) -> None:
        kinds: list[str] = []
        while len(self._deployment.kills) < self._most:
            if self.stopped.wait(self._draw.uniform(*self._seconds)):
                return
            kinds = kinds or self._draw.sample(KINDS, len(KINDS))
            kind = kinds.pop()
            if self._deployment.kill(kind):
                print(time.strftime("%H:%M:%S"), "killed", kind, file=sys.stderr, flush=True)
