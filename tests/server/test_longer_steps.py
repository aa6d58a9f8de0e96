"""Rounds that go beyond the mean: only where clients keep examples that their apps do not train on."""

import logging

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import nn

from fedbasin.client import basin
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.diagnostics.evaluation import evaluate
from fedbasin.strategies.recipes import RECIPES
from tests import tiny

SEARCHING = [name for name, recipe in RECIPES.items() if recipe.step is not None]


def unseen(context):
    draw = torch.Generator().manual_seed(50 + context.node_config["partition-id"])
    inputs = torch.randn(200, tiny.PIXELS, generator=draw)
    return [(inputs, inputs[:, : tiny.CLASSES].argmax(1))]


class Squashed(nn.Module):
    """A network without a last layer that can be solved for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(tiny.PIXELS, tiny.HIDDEN), nn.ReLU(), nn.Linear(tiny.HIDDEN, tiny.CLASSES))

    def forward(self, x):
        return torch.sinh(self.body(x))


def app(model=tiny.own_net, *, judging=lambda node: True):
    """The app; some of its clients keep examples."""
    judge, rest = (
        tiny.make_app([basin(model, tiny.batches, **more)], train_mods=[shift] if model is Squashed else None)
        for more in ({"held_out": unseen}, {})
    )
    return lambda message, context: (judge if judging(context.node_id) else rest)(message, context)


def shift(message, context, call_next):
    """Train a model that the tiny app does not know, by a step of each parameter."""
    model, (inputs, targets) = Squashed(), tiny.examples(context)
    state = message.content["arrays"].to_torch_state_dict()
    model.load_state_dict(state)
    nn.functional.cross_entropy(model(inputs), targets).backward()
    moved = {name: p.detach() - 0.05 * p.grad for name, p in model.named_parameters()}
    metrics = MetricRecord({"num-examples": len(targets), "loss": 1.0})
    return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)


def run(folder, rounds, client, model=None, recipe="auto", **settings):
    federation = tiny.federation(3, client)
    options = {"folder": str(folder), "poll_seconds": 0.001, "min_available_nodes": 3, "fraction_evaluate": 0.0}
    model = model or tiny.net()
    strategy = FedBasin(recipe, model=model, **(options | settings))
    return strategy.start(federation.grid(), ArrayRecord(model.state_dict()), rounds)


def stages(result):
    return [[stage.stage for stage in report.stages] for report in result.reports]


@pytest.mark.parametrize("recipe", SEARCHING)
def test_the_model_that_a_step_ends_in_has_the_loss_that_the_report_says(tmp_path, recipe):
    result = run(tmp_path, 1, app(), recipe=recipe)
    (report,) = result.reports
    assert [stage.stage for stage in report.stages][:2] == ["fuse", "beyond"]
    assert report.step.examples == 600
    assert report.step.length > 1
    assert report.step.loss < report.step.mean_loss
    assert report.choice.average_loss == pytest.approx(report.step.loss, rel=1e-5)
    if report.choice.trained_on == "average":
        trained = result.trained_arrays.to_torch_state_dict()
        judged = [batch for node in range(3) for batch in unseen(Partition(node))]
        assert float(evaluate(tiny.net(), trained, judged).loss) / 600 == pytest.approx(report.step.loss, rel=1e-4)


class Partition:
    def __init__(self, number):
        self.node_config = {"partition-id": number}


@pytest.mark.parametrize("recipe", [name for name in tiny.OF_ANY_MODEL if name not in SEARCHING])
def test_other_recipes_stay_at_their_mean(tmp_path, recipe):
    result = run(tmp_path, 2, app(), recipe=recipe)
    assert not any("beyond" in names for names in stages(result))
    assert all(report.step is None for report in result.reports)


def test_only_clients_that_keep_examples_are_asked(tmp_path):
    result = run(tmp_path, 2, app(judging=lambda node: node == 101))
    asked = [s for report in result.reports for s in report.stages if s.stage == "beyond"]
    assert asked
    assert {client.node_id for stage in asked for client in stage.clients} == {101}
    assert {report.step.examples for report in result.reports} == {200}


def test_where_nobody_keeps_any_it_is_said_once_and_nobody_is_asked(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "flwr.fedbasin"):
        result = run(tmp_path, 3, app(judging=lambda node: False))
    assert not any("beyond" in names for names in stages(result))
    assert caplog.text.count("pass held_out=... to basin") == 1


@pytest.mark.parametrize("settings", [{"server_optimizer": "momentum"}, {"robust": "median", "min_train_nodes": 3}])
def test_a_server_optimizer_or_a_robust_rule_takes_its_own_step(tmp_path, settings):
    assert not any("beyond" in names for names in stages(run(tmp_path, 2, app(), **settings)))


def test_models_that_share_no_start_are_not_a_step_from_the_anchor(tmp_path):
    result = run(tmp_path, 2, app(), start="own", symmetry=tiny.symmetry())
    first, second = stages(result)
    assert "beyond" not in first
    assert second.count("beyond") == 1  # there is no earlier move either


def test_a_run_that_was_cut_off_goes_on_with_the_same_moves(tmp_path):
    whole = run(tmp_path / "whole", 4, app(Squashed), Squashed())
    short = run(tmp_path / "short", 2, app(Squashed), Squashed())
    resumed = run(tmp_path, 4, app(Squashed), Squashed(), resume=str(short.folder))
    assert any(report.step.momentum for report in whole.reports)
    assert [report.step for report in resumed.reports] == [report.step for report in whole.reports]
    assert all(torch.equal(t, resumed.state_dict[name]) for name, t in whole.state_dict.items())


def test_a_model_without_a_head_still_takes_longer_steps(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "flwr.fedbasin"):
        result = run(tmp_path, 3, app(Squashed), Squashed())
    assert "takes longer steps where clients can judge them" in caplog.text
    assert all(report.step.loss < report.step.mean_loss for report in result.reports[1:])
    assert "times as far" in caplog.text
