import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedbasin.deploy import local
from fedbasin.deploy.local import DeploymentError, RunFailedError, deployment
from tests.waiting import LONG, wait_until

pytestmark = pytest.mark.deployed

PYPROJECT = """
[project]
name = "tiny"
version = "1.0.0"
description = "One round of FedAvg on three numbers"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedbasin"

[tool.flwr.app.components]
serverapp = "tiny:server"
clientapp = "tiny:client"

[tool.flwr.app.config]
word = ""
fail = false
sleep = 0
"""

APP = """
import time

import numpy as np
from fedbasin.server.exchange.streaming_grid import StreamingGrid, await_nodes
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    own = context.node_config["partition-id"]
    arrays = ArrayRecord({"w": Array(message.content["arrays"]["w"].numpy() + own)})
    content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


@server.main()
def main(grid, context):
    if context.run_config["fail"]:
        raise RuntimeError("told to fail")
    if context.run_config["sleep"]:
        print("sleeping", flush=True)
        time.sleep(context.run_config["sleep"])
    print("nodes", await_nodes(grid, 2, 300), flush=True)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    start = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
    result = strategy.start(StreamingGrid(grid), start, num_rounds=1, timeout=300)
    print(context.run_config["word"], result.arrays["w"].numpy().tolist(), flush=True)
"""


def node_config(index):
    return f"partition-id={index}"


def living_in(folder):
    """Processes whose working directory is this folder, as it is of all that a deployment starts."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_bytes().split(b"\0"))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    with deployment(2, node_config, folder, timeout_seconds=LONG) as online:
        yield online


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "tiny.py").write_text(APP)
    return folder


def test_an_app_runs_from_end_to_end(online, app):
    seen = []
    run = online.run(app, {"word": 'it is "thüs"'}, on_line=seen.append)
    assert run.status == "finished:completed"
    assert 'it is "thüs" [0.5, 0.5, 0.5]' in run.log
    assert f"nodes {sorted(online.node_ids)}" in run.log
    assert seen == list(run.log)
    assert 0 < run.serverapp_seconds < run.seconds


def test_an_app_that_fails_gives_the_end_of_its_log(online, app):
    with pytest.raises(RunFailedError, match="RuntimeError: told to fail") as raised:
        online.run(app, {"fail": True})
    assert "finished:failed" in str(raised.value)
    assert str(online.folder) in str(raised.value)


def test_a_killed_node_comes_back_under_another_id(online):
    before = list(online.node_ids)
    online.restart_node(1, LONG)
    assert online.node_ids[0] == before[0]
    assert online.node_ids[1] != before[1]


def test_a_run_that_takes_too_long_is_ended_and_its_serverapp_can_be_killed(online, app, monkeypatch):
    killed, asleep, alarm = [], threading.Event(), local._alarm

    def kill_when_asleep(line):
        if line == "sleeping":
            killed.append(online.kill_serverapps())
            asleep.set()

    @contextmanager
    def alarm_when_asleep(seconds, ring):
        # Its second has passed long before the ServerApp sleeps, on a loaded machine as on any.
        with alarm(seconds, lambda: asleep.wait(LONG) and ring()):
            yield

    monkeypatch.setattr(local, "_alarm", alarm_when_asleep)
    with pytest.raises(RunFailedError, match="took longer than 1 s"):
        online.run(app, {"sleep": 3600}, on_line=kill_when_asleep, timeout_seconds=1)
    assert killed == [1]
    assert online.kill_serverapps() == 0


def test_nothing_is_left_behind(tmp_path):
    with deployment(1, node_config, tmp_path, timeout_seconds=LONG):
        # The SuperLink, the SuperNode, and its SuperExec, which comes after it.
        wait_until(lambda: len(living_in(tmp_path)) >= 3, "not all processes are there")
    assert living_in(tmp_path) == []


def test_a_process_that_dies_at_the_start_is_reported_at_once(tmp_path):
    # "ended" and not "takes too long": nobody waited for the time to pass.
    with (
        pytest.raises(DeploymentError, match=r"supernode-0 ended with status \d+(.|\n)*invalid format"),
        deployment(1, lambda index: "partition-id=nonsense", tmp_path, timeout_seconds=LONG),
    ):
        pass
    assert living_in(tmp_path) == []


def test_a_port_that_was_taken_in_between_is_replaced(tmp_path, monkeypatch):
    free_ports = local._free_ports
    with local.socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        answers = [[taken.getsockname()[1]]]
        monkeypatch.setattr(local, "_free_ports", lambda count: answers.pop() if answers else free_ports(count))
        with deployment(0, node_config, tmp_path, timeout_seconds=LONG) as online:
            assert not online.address.endswith(f":{taken.getsockname()[1]}")


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything(tmp_path, ending):
    script = (
        "import time; from pathlib import Path; from fedbasin.deploy.local import deployment\n"
        f"with deployment(0, str, Path({str(tmp_path)!r})):\n"
        "    print('up', flush=True)\n"
        "    time.sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout.readline() == b"up\n"
            assert living_in(tmp_path)
            process.send_signal(ending)
            assert process.wait(LONG) != 0
        finally:
            process.kill()
    assert living_in(tmp_path) == []
