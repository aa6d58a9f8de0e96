import threading
from pathlib import Path

import pytest
import torch

from fedbasin.deploy.local import deployment
from fedbasin.server.run.resumption import checkpoint
from tests.waiting import LONG, wait_until

pytestmark = pytest.mark.deployed

APP = Path(__file__).parent / "faulty"


def node_config(index):
    return f"partition-id={index}"


def finished(folder):
    """The reports and the last model of the only run in a folder."""
    (made,) = (path.parent for path in folder.glob("*/rounds.jsonl"))
    return checkpoint.read_reports(made), checkpoint.load(made).model


def outcomes(flower, report):
    """How each node's reply was taken, by the node's index."""
    clients = {client.node_id: client for client in report.stages[0].clients}
    return [clients[node].outcome for node in flower.node_ids]


@pytest.fixture(scope="module")
def faulty_round(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    config = {"raises": 0, "sends-nan": 1, "fedbasin.min-available-nodes": 4, "fedbasin.folder": str(folder)}
    home = tmp_path_factory.mktemp("deployment")
    with deployment(4, node_config, home, timeout_seconds=LONG) as flower:
        flower.run(APP, config)
        (report,), model = finished(folder)
        yield outcomes(flower, report), report, model


def test_an_app_that_raises_and_an_update_that_is_not_finite_are_refused_by_name(faulty_round):
    seen, report, _ = faulty_round
    assert seen == ["client_error", "non_finite", "accepted", "accepted"]
    details = {client.outcome: client.detail for client in report.stages[0].clients}
    assert "told to raise" in details["client_error"]
    assert "weight" in details["non_finite"]


def test_what_was_refused_does_not_touch_the_sum(faulty_round):
    _, _, model = faulty_round
    torch.testing.assert_close(model["weight"], torch.full((2, 2), 3.5))


@pytest.mark.slow
def test_a_node_killed_in_the_middle_of_a_round_costs_the_round_only_its_own_update(tmp_path):
    folder = tmp_path / "runs"
    config = {
        "hangs": 2,
        "num-server-rounds": 2,
        # Three are online when the run begins, and two from then on.
        "fedbasin.min-available-nodes": 2,
        "fedbasin.folder": str(folder),
        "fedbasin.round-timeout-seconds": 120.0,
    }
    with deployment(3, node_config, tmp_path / "deployment", timeout_seconds=LONG) as flower:
        log = flower.folder / "supernode-2.log"

        def kill_when_training():
            # The node says so when it has got its message.
            wait_until(lambda: "Received" in log.read_text(errors="replace"), "no message came")
            flower.kill_node(2)

        killer = threading.Thread(target=kill_when_training, daemon=True)
        killer.start()
        flower.run(APP, config)
        killer.join(LONG)
        assert not killer.is_alive()
        reports, model = finished(folder)
        assert len(reports) == 2
        for report in reports:
            seen = [c.outcome for c in report.stages[0].clients if c.node_id != flower.node_ids[2]]
            assert seen == ["accepted", "accepted"]
        lost = {c.node_id: c.outcome for c in reports[0].stages[0].clients}[flower.node_ids[2]]
        assert lost in ("timeout", "unavailable")
    torch.testing.assert_close(model["weight"], torch.full((2, 2), 3.0))
