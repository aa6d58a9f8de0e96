"""Every outcome of a reply has a counter, and no label names a client."""

import pytest
from prometheus_client import CollectorRegistry

from fedbasin.proto.report import ClientReport, RoundReport, StageReport
from fedbasin.server.observe.metrics.telemetry import Telemetry
from fedbasin.strategies.judging.outcomes import Outcome

BAD = 101
NODES = [100, BAD, 102]


@pytest.mark.parametrize("recipe", ["fedavg", "fisher", "regmean", "features"])
@pytest.mark.parametrize("outcome", Outcome)
def test_an_outcome_is_counted_without_naming_a_client(outcome, recipe):
    clients = (
        ClientReport(100, "accepted"),
        ClientReport(BAD, outcome.name, f"node {BAD}: 3.bias"),
        ClientReport(102, "accepted"),
    )
    registry = CollectorRegistry()
    stage = StageReport("fuse", clients=clients)
    Telemetry(registry).observe(RoundReport("r", 1, recipe=recipe, stages=(stage,)))
    labels = {value for metric in registry.collect() for sample in metric.samples for value in sample.labels.values()}
    assert not labels & {str(node) for node in NODES}
    assert not any("3.bias" in value for value in labels)
    counter = {"recipe": recipe, "outcome": outcome.name}
    count = registry.get_sample_value("fedbasin_updates_total", counter)
    assert count == 1 + 2 * (outcome is Outcome.accepted)
