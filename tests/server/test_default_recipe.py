"""The default recipe compares models where it can, and is FedAvg to the bit where something is missing."""

import logging

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedbasin.client import basin
from fedbasin.server.run.settings import Settings
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.diagnostics.evaluation import evaluate
from fedbasin.strategies.recipes import RECIPES
from tests import tiny
from tests.server.flowers_loop import start as flowers_start

ROUNDS = 2


class Dropping(FedBasin):
    """A strategy with a method of its own, as an app writes it."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, list(replies)[:2])


class Tail(nn.Module):
    """A network whose outputs no last layer can be solved for."""

    def __init__(self):
        super().__init__()
        self.body = tiny.net()

    def forward(self, x):
        return torch.sin(self.body(x))


def with_mod(**parts):
    return tiny.make_app([basin(**{"model": tiny.own_net, "data": tiny.batches} | parts)])


def numbered_app():
    """A NumPy client without the mod, whose arrays are called 0, 1, 2."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        arrays = [array.numpy() + context.node_id % 10 for array in message.content["arrays"].values()]
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)

    return app


def arrays_of(model):
    return ArrayRecord(model.state_dict())


def start(app, folder, recipe, *, strategy=FedBasin, loop=None, model=True, arrays=None, **settings):
    federation = tiny.federation(3, app)
    options = {"folder": str(folder), "poll_seconds": 0.001, "min_available_nodes": 3} | settings
    basin_of_run = strategy(recipe, model=tiny.net() if model else None, **options)
    arrays = arrays or arrays_of(tiny.net())
    if loop:
        return loop(basin_of_run, federation, ROUNDS)
    return basin_of_run.start(federation.grid(), arrays, ROUNDS)


CASES = {
    "no mod": (lambda: tiny.make_app([]), {}, "the app lacks the mod; add to the client"),
    "no mod, nobody evaluates": (lambda: tiny.make_app([]), {"fraction_evaluate": 0.0}, "3 of 3 clients"),
    "no data": (lambda: tiny.make_app([basin(tiny.own_net)]), {}, "pass `data`"),
    "no task": (lambda: with_mod(data=lambda c: [(tiny.examples(c)[0], torch.ones(1))]), {}, "pass basin(task=...)"),
    "a loss of the user's": (lambda: with_mod(task="regression"), {}, "TaskError"),
    "no model on the server": (with_mod, {"model": False}, "pass model=Net()"),
    "the server aligns": (with_mod, {"align": "server", "symmetry": tiny.symmetry()}, "set align = 'client'"),
    "Flower's loop": (with_mod, {"loop": flowers_start}, "run it with FedBasin.start"),
    "a subclass": (with_mod, {"strategy": Dropping}, "override neither"),
    "a rule": (with_mod, {"rule": "ties"}, "leave it out"),
}


@pytest.mark.parametrize("case", CASES)
def test_where_something_is_missing_it_is_fedavg_and_says_once_what(case, tmp_path, caplog):
    make, options, message = CASES[case]
    with caplog.at_level(logging.INFO, "flwr.fedbasin"):
        compared = start(make(), tmp_path / "a", None, **options)
    said = [record.message for record in caplog.records if "only averages, as FedAvg" in record.message]
    assert len(said) == 1
    assert message in said[0]
    averaged = start(make(), tmp_path / "b", "fedavg", **options)
    assert {name: a.data for name, a in compared.arrays.items()} == {n: a.data for n, a in averaged.arrays.items()}
    assert all(report.choice is None for report in getattr(compared, "reports", ()))


def test_numbered_arrays_without_model_and_mod_are_averaged(tmp_path, caplog):
    arrays = ArrayRecord([np.zeros((2, 2)), np.zeros(2)])
    with caplog.at_level(logging.INFO, "flwr.fedbasin"):
        result = start(numbered_app(), tmp_path, None, model=False, arrays=arrays, fraction_evaluate=0.0)
    assert np.allclose(result.arrays["0"].numpy(), ROUNDS * 1.0)
    assert "pass model=Net()" in caplog.text


def test_a_model_without_a_head_that_can_be_solved_is_averaged(tmp_path, caplog):
    app = ClientApp(mods=[basin(Tail, tiny.batches)])

    @app.train()
    def train(message, context):
        state = message.content["arrays"].to_torch_state_dict()
        moved = {name: tensor + context.node_id % 10 for name, tensor in state.items()}
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)

    federation = tiny.federation(3, app)
    options = {"folder": str(tmp_path), "poll_seconds": 0.001, "fraction_evaluate": 0.0}
    with caplog.at_level(logging.INFO, "flwr.fedbasin"):
        result = FedBasin(model=Tail(), **options).start(federation.grid(), arrays_of(Tail()), ROUNDS)
    assert [len(report.stages) for report in result.reports] == [1, 1]
    assert "the clients' model has no last layer" in caplog.text
    assert caplog.text.count("only averages, as FedAvg") == 1


def test_one_client_without_the_mod_leaves_the_mean_and_is_named(tmp_path, caplog):
    app, bare = with_mod(), tiny.make_app([])
    federation = tiny.federation(3, app)
    answer = federation.answer
    federation.answer = lambda message: (
        bare(message, federation.contexts[101]) if message.metadata.dst_node_id == 101 else answer(message)
    )
    strategy = FedBasin(
        model=tiny.net(), folder=str(tmp_path), poll_seconds=0.001, fraction_evaluate=0.0, min_available_nodes=3
    )
    with caplog.at_level(logging.INFO, "flwr.fedbasin"):
        result = strategy.start(federation.grid(), arrays_of(tiny.net()), 3)
    assert [[s.stage for s in report.stages] for report in result.reports] == [["fuse"]] * 3
    assert "1 of 3 clients, as node 101: cannot report its layers: the app lacks the mod" in caplog.text


def test_where_nothing_is_missing_models_are_compared(tmp_path):
    assert Settings().composed == RECIPES["auto"]
    result = start(with_mod(), tmp_path, None)
    assert result.reports[0].choice is not None
    (first, _) = (report.choice for report in result.reports)
    assert first.loss <= first.average_loss


def doubtful(context):
    """Examples that the client does not train on; two fifths of their labels are drawn at random."""
    draw = torch.Generator().manual_seed(50 + context.node_config["partition-id"])
    inputs = torch.randn(200, tiny.PIXELS, generator=draw)
    drawn = torch.randint(tiny.CLASSES, (200,), generator=draw)
    return [(inputs, torch.where(torch.rand(200, generator=draw) < 0.4, drawn, inputs[:, : tiny.CLASSES].argmax(1)))]


def test_outputs_that_are_surer_than_right_are_scaled_in_the_model_that_is_served_alone(tmp_path, caplog):
    federation = tiny.federation(3, with_mod(held_out=doubtful))
    options = {"folder": str(tmp_path), "poll_seconds": 0.001, "min_available_nodes": 3, "fraction_evaluate": 0.0}
    sure = tiny.net()
    sure[-1].weight.data.mul_(20)
    with caplog.at_level(logging.INFO, "flwr.fedbasin"):
        result = FedBasin(model=tiny.net(), **options).start(federation.grid(), arrays_of(sure), 1)
    choice = result.reports[-1].choice
    assert 0 < choice.scale < 1
    assert f"its outputs times {choice.scale:.2g}" in caplog.text
    judged = [batch for context in federation.contexts.values() for batch in doubtful(context)]
    served = result.state_dict
    whole = {name: t / choice.scale if name.startswith("3.") else t for name, t in served.items()}
    losses = [float(evaluate(tiny.net(), state, judged).loss) / 600 for state in (served, whole)]
    assert losses[0] == pytest.approx(choice.loss, rel=1e-4)
    assert losses[1] - losses[0] == pytest.approx(choice.scale_gain, rel=1e-3)
    # Another model trains on, the mean as it is or a point that is not scaled.
    trained = result.trained_arrays.to_torch_state_dict()
    assert not torch.allclose(trained["3.weight"], served["3.weight"])
