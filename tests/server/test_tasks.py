"""Every task with every recipe: a run ends with a finite model, or is refused before anybody trains."""

import logging
import math

import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedbasin.client import basin
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.run.settings import SettingsError
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.parallel import is_finite
from fedbasin.strategies.tensors.state import floating
from tests import running, tiny
from tests.tasks import EXAMPLES, MEAN_LOSS, laplace

WHOLE = tiny.OF_ANY_MODEL
OTHERS = [name for name in RECIPES if name not in WHOLE]
ALWAYS = ("auto", "fisher")


def app_of(example, task=None):
    task = task or example.task
    app = ClientApp(mods=[basin(model=example.make, data=lambda context: [example.data(seed_of(context))], task=task)])
    app.trained = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        app.trained.append(context.node_id)
        model = example.model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        loss = example.train(model, seed_of(context))
        metrics = MetricRecord({"loss": loss, "num-examples": 16})
        return Message(RecordDict({"model": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        del context
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 16})}), reply_to=message)

    return app


def seed_of(context):
    return context.node_config["partition-id"]


def run(name, recipe, folder, task=None, **config):
    example = EXAMPLES[name]
    app = app_of(example, task)
    settings = {"fraction_evaluate": 0.0, "folder": str(folder), "barrier_points": 3, "align": "off"} | config
    federation = tiny.federation(2, app, recipe=recipe, **settings)
    try:
        return app, running.run(federation, example.model(), 1), None
    except (QuorumLostError, SettingsError) as error:
        return app, None, error


def pairs():
    for row, name in enumerate(EXAMPLES):
        for column, recipe in enumerate(WHOLE):
            is_sample = recipe in ALWAYS or (row + column) % 5 == 0
            yield pytest.param(name, recipe, id=f"{name}-{recipe}", marks=[] if is_sample else pytest.mark.slow)


@pytest.mark.parametrize(("name", "recipe"), list(pairs()))
def test_every_recipe_runs_on_every_task(name, recipe, tmp_path, caplog):
    caplog.set_level(logging.INFO, "flwr.fedbasin")
    _, result, error = run(name, recipe, tmp_path)
    assert error is None
    (report,) = result.reports
    assert all(client.outcome == "accepted" for stage in report.stages for client in stage.clients)
    assert all(is_finite(tensor) for tensor in floating(result.state_dict).values())
    assert all(map(math.isfinite, report.path.loss_after))
    example = EXAMPLES[name]
    assert bool(report.path.correct_after) == (example.name not in ("regression", "own loss"))
    assert caplog.text.count(f"task: {example.name}") == 1
    refit = RECIPES[recipe].refit
    if refit is not None and refit.head:
        assert (
            "head" in [s.stage for s in report.stages] or "fit" in [s.stage for s in report.stages]
        ) or not example.has_head
        assert ("no last layer that can be fitted" in caplog.text) == (not example.has_head)


@pytest.mark.parametrize("recipe", OTHERS)
def test_recipes_of_other_networks_are_refused_before_anybody_trains(recipe, tmp_path):
    app, _, error = run("regression", recipe, tmp_path)
    assert isinstance(error, SettingsError)
    assert not app.trained


@pytest.mark.parametrize("recipe", ["fisher", "kfac"])
def test_a_likelihood_that_is_not_known_is_refused_before_anybody_trains(recipe, tmp_path):
    app, _, error = run("own loss", recipe, tmp_path, Task.of_loss(laplace))
    assert "pass draw=" in str(error)
    assert not app.trained


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("regression", "classification", "pass another task"),
        ("classes", "regression", "one target for each output"),
        ("own loss", Task.of_loss(MEAN_LOSS), "reduction='none'"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_before_anybody_trains(name, task, message, tmp_path):
    app, _, error = run(name, "fedavg", tmp_path, task)
    assert message in str(error)
    assert not app.trained
    app, _, error = run(name, "fedavg", tmp_path, task, barrier_points=0)
    # A recipe that asks for no task needs none.
    assert error is None


def test_a_likelihood_that_is_not_known_is_refused_after_the_first_message(tmp_path):
    app, _, error = run("own loss", "fisher", tmp_path, Task.of_loss(laplace), fraction_evaluate=1.0)
    assert "stage check" in str(error)
    assert "pass draw=" in str(error)
    assert not app.trained
