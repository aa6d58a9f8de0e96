"""The table of the demo, from reports as its runs leave them."""

from fedbasin.deploy.demo import table_rows
from fedbasin.proto.report import ClientReport, RoundReport, StageReport


def report(*later):
    """One round: clients say how good they are when they send what they have trained, and not in later stages."""
    trained = [ClientReport(node, "accepted", metrics={"test-accuracy": a}) for node, a in enumerate((0.5, 0.75))]
    stages = (StageReport("fuse", clients=tuple(trained)), *(StageReport(name, clients=_silent()) for name in later))
    metrics = {"test-accuracy": 0.875, "ensemble-accuracy": 0.9}
    return RoundReport("a run", 1, 1, "regmean", stages=stages, server_metrics=metrics)


def _silent():
    return tuple(ClientReport(node, "accepted") for node in range(2))


def test_clients_alone_are_those_that_have_trained_whatever_stages_follow():
    for stages in ((), ("probe", "probe"), ("measure", "probe")):
        rows = {row.name: row.accuracy for row in table_rows({"one": report(*stages)})}
        assert rows == {
            "one": 0.875,
            "clients alone, mean": 0.625,
            "clients alone, best": 0.75,
            "ensemble of the five": 0.9,
        }
