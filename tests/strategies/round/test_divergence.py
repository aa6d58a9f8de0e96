"""What counts as a global loss, and when it has risen: one client decides neither."""

import math
from itertools import product

import pytest

from fedbasin.proto.report import ClientReport, RoundReport, StageReport
from fedbasin.strategies.round.divergence import global_losses, loss_rise

HONEST = [{"loss": 1.0}, {"loss": 1.1}, {"loss": 1.2}, {"loss": 1.3}]
VALUES = (math.nan, math.inf, -math.inf, 1e300, -1e300, 0.0)


def losses(*metrics):
    clients = tuple(ClientReport(node, "accepted", metrics=m) for node, m in enumerate(metrics))
    return global_losses(RoundReport("1", 1, stages=(StageReport("evaluate", clients=clients),)))


@pytest.mark.parametrize(("name", "value", "place"), list(product(("loss", "my-loss", "LOSS"), VALUES, (0, 2, 4))))
def test_one_client_makes_no_global_loss_rise_whatever_it_reports(name, value, place):
    before = losses(*HONEST, {"loss": 1.15})
    clients = [*HONEST[:place], {name: value}, *HONEST[place:]]
    assert losses(*clients).keys() == before.keys()
    assert loss_rise(losses(*clients), before, 3.0) is None


def test_a_majority_makes_it_rise():
    before = losses(*HONEST)
    assert loss_rise(losses(*[{"loss": math.nan}] * 3, {"loss": 1.0}), before, 3.0).kind == "loss_rose"
    assert loss_rise(losses(*[{"loss": 9.0}] * 3, {"loss": 1.0}), before, 3.0).kind == "loss_rose"


def test_nothing_rises_above_a_loss_that_was_not_finite():
    broken = losses(*[{"loss": math.nan}] * 4)
    assert loss_rise(broken, broken, 3.0) is None
