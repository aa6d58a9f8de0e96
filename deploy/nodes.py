"""Many SuperNodes in one container, for a simulation on one machine.

Every SuperNode and every ClientApp is Flower's own program in a process of its own. All are forks of one process that
has imported torch and Flower: they share its memory, and start at once instead of importing everything again. A
ClientApp starts where a worker is free, so that memory grows with the workers and hardly with the clients.

    python -m fedbasin.deploy.nodes --clients 50 --insecure --superlink superlink:8000
"""

import argparse
import gc
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess

import httpx

from fedbasin.deploy.processes import sigterm_as_exit

_FORK = multiprocessing.get_context("fork")
_POLL_SECONDS = 0.05


class Node:
    """One client: its SuperNode, started again where it has ended, and its ClientApps."""

    def __init__(self, index: int, clients: int, port: int, options: Sequence[str]) -> None:
        """Prepare client `index` of `clients`, with a port of its own; `{index}` in an option becomes its number."""
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        self._home = f"{os.environ.get('FLWR_HOME', '/tmp/flwr')}/{index}"  # noqa: S108 - of the container
        self._address = f"127.0.0.1:{port}"
        config = f"partition-id={index} num-partitions={clients}"
        options = [option.replace("{index}", str(index)) for option in options]
        ports = ("--port", str(port), "--isolation", "process", "--node-config", config)
        self._command = ("flower-supernode", *options, *ports)
        # Of Flower's own SuperExec, which takes the tasks of a single SuperNode.
        version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
        self._tasks = RuntimeHttpClient.from_server_address(self._address, True, None, [version])
        self._supernode: BaseProcess | None = None

    def keep_running(self) -> None:
        """Start the SuperNode where it does not run."""
        if self._supernode is None or not self._supernode.is_alive():
            self._supernode = _fork(self._home, *self._command)

    def work(self) -> BaseProcess | None:
        """Start the ClientApp of a message that waits, if one does."""
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.constant import TaskType

        try:
            task = self._tasks.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except httpx.HTTPError:  # it starts, or has just ended
            return None
        if not task.token:
            return None
        where = ("--runtime-api-address", self._address, "--token", task.token)
        return _fork(self._home, "flwr-clientapp", *where, "--insecure", "--parent-pid", str(os.getpid()))

    def end(self) -> None:
        """Kill the SuperNode."""
        if self._supernode is not None:
            self._supernode.kill()


def main() -> None:
    """Run the SuperNodes until SIGTERM."""
    parser = argparse.ArgumentParser(description="Run many SuperNodes; all other options are those of a SuperNode.")
    parser.add_argument("--clients", type=int, required=True, help="number of SuperNodes, one for each partition")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="ClientApps at the same time")
    parser.add_argument("--first-port", type=int, default=9100, help="of their ports on loopback, one for each")
    parser.add_argument("--imports", default="fedbasin.client", help="modules to import once, separated by commas")
    options, of_supernode = parser.parse_known_args()
    if options.clients < 1 or options.workers < 1:
        parser.error("--clients and --workers must be at least 1")
    for name in ("torch", "flwr.supernode.cli", "flwr.supernode.main", *options.imports.split(",")):
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would touch, and so copy, all that is shared
    nodes = [Node(index, options.clients, options.first_port + index, of_supernode) for index in range(options.clients)]
    apps: list[BaseProcess] = []
    with sigterm_as_exit():
        try:
            while True:
                apps = _tend(nodes, apps, options.workers)
        finally:
            for process in apps:
                process.kill()
            for node in nodes:
                node.end()


def _tend(nodes: Sequence[Node], apps: Sequence[BaseProcess], workers: int) -> list[BaseProcess]:
    """Look after every node once, and return the ClientApps that run."""
    running = list(apps)
    for node in nodes:
        node.keep_running()
        running = [app for app in running if app.is_alive()]
        app = node.work() if len(running) < workers else None
        if app is not None:
            running.append(app)
        else:
            time.sleep(_POLL_SECONDS)
    return running


def _fork(home: str, *command: str) -> BaseProcess:
    process = _FORK.Process(target=_run, args=(os.getpid(), home, command), name=command[0])
    process.start()
    return process


def _run(parent: int, home: str, command: Sequence[str]) -> None:
    """Run one of Flower's programs in this process, which ends with its parent."""
    import signal
    from importlib.metadata import entry_points

    from flwr.supercore.app_utils import start_parent_process_monitor

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    start_parent_process_monitor(parent)
    os.environ["FLWR_HOME"] = home
    sys.argv = list(command)
    (program,) = entry_points(group="console_scripts", name=command[0])
    program.load()()


if __name__ == "__main__":
    main()
