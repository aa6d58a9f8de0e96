"""What can be known before the first message is told then: nobody trains for a run that cannot work."""

import logging

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import TensorDataset

from fedbasin.client import basin
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.run.resumption import checkpoint
from fedbasin.server.run.settings import SettingsError
from tests import running, tiny


def start(federation, folder, model=None, rounds=1, **arguments):
    settings = {"align": "off", "fraction_evaluate": 0.0, "folder": str(folder)} | arguments
    return running.run(federation, model or tiny.net(), rounds, **settings)


def refused(folder, error=SettingsError, model=None, **arguments):
    """Return the message of a run that nobody trained for."""
    federation = tiny.federation()
    with pytest.raises(error) as caught:
        start(federation, folder, model, **arguments)
    assert not federation.app.trained
    return str(caught.value)


def test_a_model_that_is_larger_than_a_reply_may_be(tmp_path):
    message = refused(tmp_path, max_update_bytes=1000)
    assert "max-update-bytes = 1000: the model has" in message
    assert "set at least" in message


def test_statistics_that_are_larger_than_a_reply_may_be(tmp_path):
    model = nn.Sequential(nn.Linear(300, 2))
    message = refused(tmp_path, model=model, recipe="regmean", max_update_bytes=10_000)
    assert "its largest statistic" in message
    assert "statistics-budget-bytes" in message


def test_statistics_of_many_times_the_model_are_pointed_out(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "flwr.fedbasin")
    model = nn.Sequential(nn.Linear(300, 2))
    with pytest.raises(QuorumLostError):
        start(tiny.federation(), tmp_path, model, recipe="regmean")
    assert "times the model" in caplog.text


@pytest.mark.parametrize("name", ["a file", "a file/below"])
def test_a_folder_that_cannot_be_written(tmp_path, name):
    (tmp_path / "a file").write_text("")
    assert "choose a folder" in refused(tmp_path / name)


def test_a_model_that_would_be_refused_if_a_client_sent_it(tmp_path):
    model = tiny.net()
    model[0].weight.data[0, 0] = torch.nan
    message = refused(tmp_path, model=model)
    assert "sent back as it is, would be refused: non_finite, 0.weight" in message


def test_a_model_that_cannot_be_sent(tmp_path):
    model = tiny.net()
    model.register_buffer("mask", torch.ones(3, dtype=torch.uint16))
    assert "the initial model cannot be sent: tensor 'mask' is uint16" in refused(tmp_path, model=model, packed=True)


@pytest.mark.parametrize(("score", "named"), [("good", "'good'"), (float("nan"), "nan")])
def test_a_score_that_is_none(tmp_path, score, named):
    message = refused(tmp_path, score_fn=lambda state: score, bootstrap="best", start="own", align="auto",
                      symmetry=tiny.symmetry())  # fmt: skip
    assert f"score_fn returned {named}" in message


def test_an_evaluation_that_returns_nonsense_for_the_initial_model(tmp_path):
    assert "evaluate_fn returned a dict in round 0" in refused(tmp_path, evaluate_fn=lambda number, arrays: {"a": 1})


def broken_later(number, arrays):
    return MetricRecord() if number == 0 else 1 / 0


FUNCTIONS = {
    "evaluate_fn": broken_later,
    "train_metrics_aggr_fn": lambda contents, key: 1 / 0,
    "client_metrics_fn": lambda node, parameters: 1 / 0,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_fails_after_the_training_does_not_cost_the_round(tmp_path, name):
    federation = tiny.federation()
    with pytest.raises(ZeroDivisionError) as raised:
        start(federation, tmp_path, rounds=2, **{name: FUNCTIONS[name]})
    assert raised.value.__notes__ == [f"raised by {name} in round 1"]
    assert checkpoint.load(tmp_path / "1").server_round == 1
    assert len(checkpoint.read_reports(tmp_path / "1")) == 1


def test_a_function_that_returns_nonsense_is_named_once_the_round_is_saved(tmp_path):
    with pytest.raises(SettingsError, match="client_metrics_fn returned a str in round 1"):
        start(tiny.federation(), tmp_path, client_metrics_fn=lambda node, parameters: "good")
    assert checkpoint.load(tmp_path / "1").server_round == 1


def app_of(data=tiny.batches, *, evaluates=True, mods=None):
    """An app that counts its trainings."""
    app = ClientApp(mods=[basin(model=tiny.own_net, data=data)] if mods is None else mods)
    app.trained = []

    @app.train()
    def train(message, context):
        app.trained.append(context.node_id)
        arrays = ArrayRecord(message.content["arrays"].to_torch_state_dict())
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    if evaluates:

        @app.evaluate()
        def evaluate(message, context):
            metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def wider_net():
    return nn.Sequential(nn.Linear(tiny.PIXELS, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, tiny.CLASSES))


UNREADABLE = {
    "no batches": list,
    "names": lambda: [{"text": torch.zeros(2), "label": torch.zeros(2)}],
    "a shape": lambda: [(torch.zeros(2, 9), torch.zeros(2, dtype=torch.long))],
    "single examples": lambda: TensorDataset(torch.zeros(2, tiny.PIXELS), torch.zeros(2, dtype=torch.long)),
}
OTHER_MODELS = {
    "compiled": (lambda: torch.compile(tiny.net(), backend="eager"), "make the model within, without '_orig_mod.'"),
    "in parallel": (lambda: nn.DataParallel(tiny.net()), "make the model within, without 'module.'"),
    "another class": (lambda: nn.Linear(tiny.PIXELS, tiny.CLASSES), r"has no tensor '0\.weight'"),
    "another width": (wider_net, r"'0\.weight' is \(9, 4\)"),
    "no module": (lambda: tiny.net().state_dict(), "has made a OrderedDict; let it return the model"),
    "nothing": (lambda: None, "has made a NoneType"),
}


@pytest.mark.parametrize("evaluate", [0.0, 1.0])
@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_data_that_the_mod_cannot_read_is_told_before_anybody_trains(tmp_path, data, evaluate):
    app = app_of(data)
    federation = tiny.federation(app=app)
    with pytest.raises(QuorumLostError, match=r"does not go through the model|given cannot be read"):
        start(federation, tmp_path, recipe="regmean", fraction_evaluate=evaluate)
    assert not app.trained
    if evaluate:
        assert len(federation.asked) == 2


@pytest.mark.parametrize(("model", "told"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_a_model_that_is_not_the_global_one_is_told_before_anybody_trains(tmp_path, model, told):
    app = app_of(mods=[basin(model=model, data=tiny.batches)])
    with pytest.raises(QuorumLostError, match=told):
        start(tiny.federation(app=app), tmp_path, recipe="regmean", fraction_evaluate=1.0)
    assert not app.trained


def test_data_of_single_examples_is_told_from_batches(tmp_path):
    app = app_of(UNREADABLE["single examples"])
    with pytest.raises(QuorumLostError, match="pass a DataLoader and not the data set"):
        start(tiny.federation(app=app), tmp_path, recipe="regmean", fraction_evaluate=1.0)


def test_a_missing_mod_is_told_before_anybody_trains(tmp_path):
    app = app_of(mods=[])
    with pytest.raises(QuorumLostError, match="missing_mod"):
        start(tiny.federation(app=app), tmp_path, recipe="regmean", fraction_evaluate=1.0)
    assert not app.trained


def test_one_iterator_for_all_passes_is_told_before_anybody_trains(tmp_path):
    once = iter(tiny.batches(tiny.federation().contexts[100]))
    app = app_of(lambda: once)
    with pytest.raises(QuorumLostError, match="can be read once"):
        start(tiny.federation(app=app), tmp_path, recipe="regmean")
    assert not app.trained


def test_an_app_that_cannot_evaluate_is_named_and_not_asked_again(tmp_path, caplog):
    app = app_of(evaluates=False)
    federation = tiny.federation(app=app)
    run = start(federation, tmp_path, rounds=3, fraction_evaluate=1.0)
    asked = [m.metadata.dst_node_id for m in federation.asked if m.metadata.message_type == "evaluate"]
    # Two before the training, and the third when it is its turn.
    assert sorted(asked) == [100, 101, 102]
    assert "no_evaluate" in caplog.text
    assert [stage.stage for report in run.reports for stage in report.stages].count("fuse") == 3


def test_an_app_that_can_evaluate_is_asked_once_more_than_without_the_first_message(tmp_path):
    federation = tiny.federation(app=app_of())
    start(federation, tmp_path, fraction_evaluate=1.0)
    kinds = [message.metadata.message_type for message in federation.asked]
    assert kinds == ["evaluate"] + ["train"] * 3 + ["evaluate"] * 3
