"""SuperNodes behind a bad network: delay, loss, and a link that is cut for a minute."""

import threading
import time

import pytest
import torch
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE

from fedbasin.deploy.local import deployment
from tests.faults.relay import Relay
from tests.faults.test_clients import APP, finished, node_config
from tests.waiting import LONG

pytestmark = [pytest.mark.deployed, pytest.mark.slow]

NODES = 3
ROUNDS = 2
CUT_SECONDS = 60.0
FORGOTTEN_SECONDS = HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE + 10


def test_a_run_completes_with_delay_loss_and_a_cut_link(tmp_path):
    folder = tmp_path / "runs"
    config = {
        "num-server-rounds": ROUNDS,
        "fedbasin.min-available-nodes": NODES,
        "fedbasin.quorum": 1.0,
        # For the SuperLink a node whose link is cut goes offline, and the messages to it are lost.
        "fedbasin.attempts": 10,
        "fedbasin.folder": str(folder),
        "fedbasin.round-timeout-seconds": LONG,
    }
    with deployment(NODES, node_config, tmp_path / "deployment", timeout_seconds=LONG) as flower:
        superlink = flower.address
        with Relay(superlink, delay_seconds=0.2, loss=0.05) as relay:
            # The nodes come back behind the relay; the ServerApp and `flwr run` stay beside the SuperLink.
            flower.address = relay.address
            for index in range(NODES):
                flower.restart_node(index, LONG)
            flower.address = superlink
            # For the SuperLink the nodes that were killed stay online for a while, and would be asked.
            time.sleep(FORGOTTEN_SECONDS)
            cutter = threading.Thread(target=relay.cut, args=(CUT_SECONDS,), daemon=True)

            def cut_in_the_first_round(line):
                if "[ROUND 1/" in line and not cutter.is_alive():
                    cutter.start()

            began = time.monotonic()
            flower.run(APP, config, cut_in_the_first_round, timeout_seconds=2 * LONG)
            cutter.join(LONG)
            assert time.monotonic() - began > CUT_SECONDS
            assert relay.lost > 0
    reports, model = finished(folder)
    accepted = [[client.outcome for client in report.stages[0].clients] for report in reports]
    assert accepted == [["accepted"] * NODES] * ROUNDS
    # Every round adds the mean of 1, 2 and 3.
    torch.testing.assert_close(model["weight"], torch.full((2, 2), 2.0 * ROUNDS))
