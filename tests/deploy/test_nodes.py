"""Many SuperNodes as forks of one process, with the digits app on a real SuperLink."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import fedbasin
from fedbasin.deploy.local import RunFailedError, deployment
from fedbasin.deploy.processes import SCRIPTS
from tests.waiting import LONG

pytestmark = pytest.mark.deployed

PATHS = {"PYTHONPATH": str(Path(fedbasin.__file__).parent.parent)}
DIGITS = Path(__file__).parents[2] / "deploy/digits"
IMPORTS = "fedbasin.client,sklearn.datasets,sklearn.model_selection"
SHORT = {
    "check-partitions": True,
    "epochs": 1,
    "width": 16,
    "fedbasin.recipe": "fedavg",
    "fedbasin.align": "off",
    "fedbasin.start": "shared",
}


@contextmanager
def started(online, name, *command):
    path = f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}"  # a SuperNode starts its SuperExec by name
    home = str(online.folder / name)
    environment = {"PATH": path, "OMP_NUM_THREADS": "1", "FLWR_HOME": home, "FLWR_TELEMETRY_ENABLED": "0"}
    command = [*command, "--insecure", "--superlink", online.address]
    with (online.folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **PATHS, **environment}, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(LONG)


def free_ports(count):
    """The first of ports in a row that are free now."""
    for first in range(20000, 32000, count):
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            try:
                for port, listener in enumerate(sockets, first):
                    listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise OSError("no ports in a row are free")


@contextmanager
def online_nodes(folder, count):
    """Nodes on a SuperLink, and a port that none of them has."""
    port = free_ports(count + 1)
    numbers = ("--clients", str(count), "--workers", "2", "--first-port", str(port), "--imports", IMPORTS)
    nodes = (sys.executable, "-m", "fedbasin.deploy.nodes", *numbers)
    with deployment(0, str, folder, PATHS, LONG) as online, started(online, "nodes", *nodes):
        yield online, port + count


@pytest.mark.slow
def test_every_client_trains_on_a_partition_of_its_own(tmp_path):
    with online_nodes(tmp_path, 3) as (online, _):
        run = online.run(DIGITS, {**SHORT, "fedbasin.min-available-nodes": 3}, timeout_seconds=LONG)
        assert "fuse: 3 of 3 clients accepted" in "\n".join(run.log)


@pytest.mark.slow
def test_two_nodes_with_the_same_partition_are_refused_by_name(tmp_path):
    with online_nodes(tmp_path, 2) as (online, port):
        same = ("--port", str(port), "--node-config", "partition-id=1 num-partitions=2")
        with (
            started(online, "same", SCRIPTS / "flower-supernode", *same),
            pytest.raises(RunFailedError, match=r"partition 1: nodes \d+, \d+; give every node"),
        ):
            online.run(DIGITS, {**SHORT, "fedbasin.min-available-nodes": 3}, timeout_seconds=LONG)


@pytest.mark.parametrize("option", ["--clients", "--workers"])
def test_numbers_below_one_are_refused(option):
    command = [sys.executable, "-m", "fedbasin.deploy.nodes", "--clients", "2", option, "0"]
    done = subprocess.run(command, env={**os.environ, **PATHS}, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 2
    assert "must be at least 1" in done.stderr
