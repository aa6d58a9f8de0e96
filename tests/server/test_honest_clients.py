"""Honest clients of tasks on which most have nothing left to learn after some rounds: nobody is refused."""

import pytest

from tests import running
from tests.protocol import rules
from tests.protocol.setting import Setting


@pytest.fixture
def reports(monkeypatch):
    """The reports of the rounds of the runs of a test."""
    found = []
    start = running.run

    def run(federation, *arguments, **settings):
        federation.run_config["fedbasin.quorum"] = 0.2  # a refusal is to be told by the report
        result = start(federation, *arguments, **settings)
        found.extend(result.reports)
        return result

    monkeypatch.setattr(running, "run", run)
    return found


SLOW = [
    (task, split, rule)
    for task in ("wine", "cancer")
    for split in ("iid", "dirichlet(0.3)")
    for rule in ("fedavg", "auto", "auto-features", "regmean", "features", "fisher", "kfac", "head")
]
QUICK = [("wine", "iid", "auto-features"), ("cancer", "dirichlet(0.3)", "fedavg"), ("cancer", "dirichlet(0.3)", "auto")]


def refusals(reports):
    """Return what was said of the clients that were not accepted."""
    clients = [client for report in reports for stage in report.stages for client in stage.clients]
    assert clients
    return {(client.outcome, client.detail) for client in clients if client.outcome != "accepted"}


@pytest.mark.parametrize(
    ("task", "split", "rule"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in QUICK)],
)
def test_every_reply_is_accepted(reports, tmp_path, task, split, rule):
    rules.run(Setting(task, split, "mlp", rule, clients=5), 9, tmp_path, lambda point: None)
    assert refusals(reports) == set()
    assert [incident for report in reports for incident in report.incidents if "update_norm" in incident.kind] == []
    assert len(reports) == 9


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", "auto", "regmean"])
@pytest.mark.parametrize("size", [10, 20])
def test_clients_of_two_classes_move_against_each_other_and_nobody_is_refused(reports, tmp_path, rule, size):
    rules.run(Setting("cancer", "dirichlet(0.3)", "mlp", rule, clients=size), 9, tmp_path, lambda point: None)
    assert refusals(reports) == set()
