"""FedBasin takes every argument of Flower's FedAvg and of `Strategy.start`, with the same defaults and effect.

For each parameter there is a test whose name begins with `test_` and the parameter's name; a parameter that a new
Flower adds fails here until there is one.
"""

from inspect import Parameter, signature

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from fedbasin.client import basin
from fedbasin.proto.header import HEADER
from fedbasin.server.exchange.streaming_grid import StreamingGrid, TooFewNodesError
from fedbasin.server.run.settings import Settings, SettingsError
from fedbasin.server.strategy import FedBasin
from tests.federation import Federation

CLIENTS = 4
NODES = [100, 101, 102, 103]
ARGUMENTS = signature(FedAvg).parameters
ARGUMENTS_OF_START = {n: p for n, p in signature(Strategy.start).parameters.items() if n != "self"}


def net():
    return nn.Linear(2, 2)


def make_app(has_mod=False, arrays_key="arrays", config_key="config"):
    """Return clients that add 1, 2, 3 and 4 to every entry; their `tokens` are weights that differ, too."""
    app = ClientApp(mods=[basin(model=net)] if has_mod else [])
    app.configs = {"train": {}, "evaluate": {}}

    def metrics(context, **measured):
        number = context.node_id - 99
        return MetricRecord({**measured, "num-examples": 5, "tokens": number**2})

    def settings(message):
        # Without the mod, an app sees the header as one more setting.
        return {k: v for k, v in message.content[config_key].items() if k != HEADER or has_mod}

    @app.train()
    def train(message, context):
        number = context.node_id - 99
        app.configs["train"][context.node_id] = settings(message)
        state = message.content[arrays_key].to_torch_state_dict()
        moved = ArrayRecord({name: tensor + number for name, tensor in state.items()})
        content = {arrays_key: moved, "metrics": metrics(context, loss=float(number))}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        app.configs["evaluate"][context.node_id] = settings(message)
        mean = message.content[arrays_key].to_torch_state_dict()["bias"].mean().item()
        content = {"metrics": metrics(context, error=mean * (context.node_id - 99))}
        return Message(RecordDict(content), reply_to=message)

    return app


class Run:
    """A run of `FedBasin`, and the app that its clients ran."""

    def __init__(self, folder, app=None, rounds=1, start=None, grid=None, **arguments):
        self.app = app or make_app()
        federation = Federation(self.app, {}, CLIENTS)
        arguments = {"wait_timeout_seconds": 0.1, "poll_seconds": 0.001} | arguments
        self.grid = federation.grid(**(grid or {}))
        strategy = FedBasin(folder=str(folder), **arguments)
        self.result = strategy.start(self.grid, zeros(), rounds, **(start or {}))
        self.report = self.result.reports[-1]

    def asked(self, kind):
        return len(self.app.configs[kind])

    @property
    def bias(self):
        return float(self.result.arrays["bias"].numpy()[0])


def zeros():
    return ArrayRecord({n: torch.zeros_like(t) for n, t in net().state_dict().items()})


def flower(app=None, **arguments):
    """Return Flower's own result for the same clients."""
    federation = Federation(app or make_app(), {}, CLIENTS)
    return FedAvg(**arguments).start(StreamingGrid(federation.grid(), 0.001), zeros(), 1)


def same(ours, flowers):
    """Check that two results have the same model and the same metrics."""
    for name, array in flowers.arrays.items():
        torch.testing.assert_close(
            torch.tensor(ours.arrays[name].numpy()), torch.tensor(array.numpy()), check_dtype=False
        )
    for metrics in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        left, right = getattr(ours, metrics), getattr(flowers, metrics)
        assert left.keys() == right.keys()
        for number, record in right.items():
            assert dict(left[number]) == pytest.approx(dict(record))


def by_largest(contents, key):
    """Aggregate metrics as the largest of the clients', beside the key and the number of clients."""
    records = [content["metrics"] for content in contents]
    names = records[0].keys() - {key}
    largest = {f"largest-{name}": max(record[name] for record in records) for name in names}
    return MetricRecord({**largest, "clients": len(records), "weights": sum(r[key] for r in records)})


class TestEveryParameter:
    @pytest.mark.parametrize("name", ARGUMENTS)
    def test_of_fedavg_has_a_test_here(self, name):
        assert [test for test in globals() if test.startswith(f"test_{name}_")]

    @pytest.mark.parametrize("name", ARGUMENTS_OF_START)
    def test_of_start_has_a_test_here(self, name):
        assert [test for test in globals() if test.startswith(f"test_start_{name}_")]

    @pytest.mark.parametrize("name", ARGUMENTS)
    def test_of_fedavg_has_the_same_default(self, name):
        own = signature(FedBasin).parameters
        default = own[name].default if name in own else Settings.model_fields[name].default
        assert default == ARGUMENTS[name].default

    @pytest.mark.parametrize("name", ARGUMENTS_OF_START)
    def test_of_start_has_the_same_place_and_default(self, name):
        own = signature(FedBasin.start).parameters
        assert list(own)[1:] == list(ARGUMENTS_OF_START)
        assert own[name].default == ARGUMENTS_OF_START[name].default
        assert own[name].kind == Parameter.POSITIONAL_OR_KEYWORD


@pytest.mark.parametrize("has_mod", [False, True])
def test_without_arguments_a_run_is_flowers_fedavg(tmp_path, has_mod):
    run = Run(tmp_path, make_app(has_mod))
    same(run.result, flower(make_app()))
    assert run.bias == 2.5


@pytest.mark.parametrize(("fraction", "asked"), [(0.5, 2), (0.75, 3), (1.0, 4), (0.0, 0)])
def test_fraction_train_is_the_share_of_the_nodes_that_train(tmp_path, fraction, asked):
    run = Run(tmp_path, fraction_train=fraction)
    assert (run.asked("train"), run.asked("evaluate")) == (asked, 4)


def test_fraction_train_of_zero_evaluates_alone(tmp_path):
    run = Run(tmp_path, fraction_train=0.0)
    assert run.bias == 0
    same(run.result, flower(fraction_train=0.0))


@pytest.mark.parametrize(("fraction", "asked"), [(0.5, 2), (0.75, 3), (1.0, 4), (0.0, 0)])
def test_fraction_evaluate_is_the_share_of_the_nodes_that_evaluate(tmp_path, fraction, asked):
    run = Run(tmp_path, fraction_evaluate=fraction)
    assert (run.asked("train"), run.asked("evaluate")) == (4, asked)


@pytest.mark.parametrize(("least", "asked"), [(1, 1), (2, 2), (3, 3)])
def test_min_train_nodes_train_also_where_the_fraction_is_less(tmp_path, least, asked):
    run = Run(tmp_path, fraction_train=0.25, min_train_nodes=least)
    assert (run.asked("train"), run.asked("evaluate")) == (asked, 4)


def test_min_train_nodes_are_waited_for(tmp_path):
    with pytest.raises(TooFewNodesError, match="4 of 5 nodes"):
        Run(tmp_path, min_train_nodes=5)


@pytest.mark.parametrize(("least", "asked"), [(1, 1), (2, 2), (3, 3)])
def test_min_evaluate_nodes_evaluate_also_where_the_fraction_is_less(tmp_path, least, asked):
    run = Run(tmp_path, fraction_evaluate=0.25, min_evaluate_nodes=least)
    assert (run.asked("train"), run.asked("evaluate")) == (4, asked)


def test_min_evaluate_nodes_are_waited_for(tmp_path):
    with pytest.raises(TooFewNodesError, match="4 of 5 nodes"):
        Run(tmp_path, min_evaluate_nodes=5)


def test_min_available_nodes_are_waited_for(tmp_path):
    app = make_app()
    with pytest.raises(TooFewNodesError, match="4 of 5 nodes"):
        Run(tmp_path, app, min_available_nodes=5)
    assert app.configs == {"train": {}, "evaluate": {}}
    assert Run(tmp_path, app, min_available_nodes=4).asked("train") == 4


@pytest.mark.parametrize("has_mod", [False, True])
def test_weighted_by_key_names_the_weights_of_models_and_metrics(tmp_path, has_mod):
    run = Run(tmp_path, make_app(has_mod), weighted_by_key="tokens")
    same(run.result, flower(weighted_by_key="tokens"))
    # The sum of the cubes over the sum of the squares.
    assert run.bias == pytest.approx(100 / 30)
    assert run.report.train_metrics["loss"] == pytest.approx(100 / 30)
    assert [client.examples for client in run.report.stages[0].clients] == [1, 4, 9, 16]


def test_weighted_by_key_that_a_client_lacks_refuses_it_by_name(tmp_path):
    with pytest.raises(RuntimeError, match=r"bad_weight.*in the metrics"):
        Run(tmp_path, weighted_by_key="batches")


@pytest.mark.parametrize("has_mod", [False, True])
def test_arrayrecord_key_names_the_record_of_arrays(tmp_path, has_mod):
    run = Run(tmp_path, make_app(has_mod, arrays_key="weights"), arrayrecord_key="weights")
    same(run.result, flower(make_app(arrays_key="weights"), arrayrecord_key="weights"))
    assert (run.asked("train"), run.asked("evaluate")) == (4, 4)


@pytest.mark.parametrize("has_mod", [False, True])
def test_configrecord_key_names_the_record_of_settings(tmp_path, has_mod):
    app = make_app(has_mod, config_key="settings")
    run = Run(tmp_path, app, start={"train_config": ConfigRecord({"lr": 0.1})}, configrecord_key="settings")
    assert app.configs["train"] == {node: {"lr": 0.1, "server-round": 1} for node in NODES}
    assert app.configs["evaluate"] == {node: {"server-round": 1} for node in NODES}
    same(run.result, flower(make_app(config_key="settings"), configrecord_key="settings"))


@pytest.mark.parametrize("key", ["num-examples", "tokens"])
@pytest.mark.parametrize("has_mod", [False, True])
def test_train_metrics_aggr_fn_aggregates_the_metrics_of_training(tmp_path, has_mod, key):
    arguments = {"train_metrics_aggr_fn": by_largest, "weighted_by_key": key}
    run = Run(tmp_path, make_app(has_mod), **arguments)
    same(run.result, flower(**arguments))
    assert run.report.train_metrics["largest-loss"] == 4
    assert run.report.train_metrics["clients"] == 4
    assert "error" in run.report.evaluate_metrics


@pytest.mark.parametrize("key", ["num-examples", "tokens"])
@pytest.mark.parametrize("has_mod", [False, True])
def test_evaluate_metrics_aggr_fn_aggregates_the_metrics_of_evaluation(tmp_path, has_mod, key):
    arguments = {"evaluate_metrics_aggr_fn": by_largest, "weighted_by_key": key}
    run = Run(tmp_path, make_app(has_mod), **arguments)
    same(run.result, flower(**arguments))
    assert run.report.evaluate_metrics["largest-error"] == pytest.approx(4 * run.bias)
    assert "loss" in run.report.train_metrics


def test_start_grid_carries_all_messages(tmp_path):
    # The first message goes to one client, before all are asked to train.
    assert Run(tmp_path, rounds=2).grid.pushed == 1 + 2 * 2 * CLIENTS


def test_start_initial_arrays_are_what_clients_begin_with(tmp_path):
    strategy = FedBasin(folder=str(tmp_path), poll_seconds=0.001, min_available_nodes=CLIENTS)
    federation = Federation(make_app(), {}, CLIENTS)
    ones = ArrayRecord({name: torch.ones_like(t) for name, t in net().state_dict().items()})
    result = strategy.start(federation.grid(), ones, 1)
    assert result.arrays["bias"].numpy().tolist() == [3.5, 3.5]
    assert ones["bias"].numpy().tolist() == [1, 1]


@pytest.mark.parametrize("rounds", [1, 3])
def test_start_num_rounds_are_run(tmp_path, rounds):
    run = Run(tmp_path, rounds=rounds)
    assert [report.round for report in run.result.reports] == list(range(1, rounds + 1))
    assert run.bias == 2.5 * rounds
    assert list(run.result.train_metrics_clientapp) == list(range(1, rounds + 1))


def test_start_timeout_is_the_deadline_of_a_stage(tmp_path):
    run = Run(tmp_path, start={"timeout": 0.2}, grid={"latency": lambda node: float("inf") if node == 103 else 0.0})
    for stage in run.report.stages:
        outcomes = {client.node_id: client.outcome for client in stage.clients}
        assert outcomes == {**dict.fromkeys(NODES[:3], "accepted"), 103: "timeout"}
    assert run.bias == 2


def test_start_timeout_that_differs_from_the_setting_is_refused(tmp_path):
    app = make_app()
    with pytest.raises(SettingsError, match=r"start\(timeout=50\) and round_timeout_seconds = 60"):
        Run(tmp_path, app, start={"timeout": 50}, round_timeout_seconds=60.0)
    assert app.configs["train"] == {}
    assert Run(tmp_path, app, start={"timeout": 60}, round_timeout_seconds=60.0).bias == 2.5


@pytest.mark.parametrize("has_mod", [False, True])
def test_start_train_config_reaches_training_and_nothing_else(tmp_path, has_mod):
    app, config = make_app(has_mod), ConfigRecord({"lr": 0.1})
    Run(tmp_path, app, 2, {"train_config": config})
    assert app.configs["train"] == {node: {"lr": 0.1, "server-round": 2} for node in NODES}
    assert app.configs["evaluate"] == {node: {"server-round": 2} for node in NODES}
    assert dict(config) == {"lr": 0.1}


@pytest.mark.parametrize("has_mod", [False, True])
def test_start_evaluate_config_reaches_evaluation_and_nothing_else(tmp_path, has_mod):
    app = make_app(has_mod)
    Run(tmp_path, app, 2, {"evaluate_config": ConfigRecord({"batch": 8})})
    assert app.configs["evaluate"] == {node: {"batch": 8, "server-round": 2} for node in NODES}
    assert app.configs["train"] == {node: {"server-round": 2} for node in NODES}


def test_start_evaluate_fn_sees_the_initial_model_and_that_of_every_round(tmp_path):
    seen = {}

    def evaluate(server_round, arrays):
        seen[server_round] = float(arrays["bias"].numpy()[0])
        return None if server_round == 1 else MetricRecord({"bias": seen[server_round]})

    run = Run(tmp_path, rounds=2, start={"evaluate_fn": evaluate})
    assert seen == {0: 0, 1: 2.5, 2: 5}
    records = {n: dict(r) for n, r in run.result.evaluate_metrics_serverapp.items()}
    assert records == {0: {"bias": 0}, 2: {"bias": 5}}
    assert [report.server_metrics for report in run.result.reports] == [{}, {"bias": 5}]


def test_start_evaluate_fn_that_returns_another_type_is_refused_by_name(tmp_path):
    with pytest.raises(SettingsError, match="evaluate_fn returned a dict in round 0"):
        Run(tmp_path, start={"evaluate_fn": lambda number, arrays: {"loss": 1.0}})
