"""A client whose labels contradict the others' is named in every recipe that fits a head, and leaves no trace in it."""

import pytest
import torch

from fedbasin.client import basin
from fedbasin.strategies.recipes import RECIPES, HeadRefit
from tests import running, tiny

CLIENTS, BAD = 6, 103
FITTING = [
    name
    for name in tiny.OF_ANY_MODEL
    if (refit := RECIPES[name].refit) and (isinstance(refit, HeadRefit) or refit.head is not None)
]


def examples(context):
    """Three classes far apart; the labels of one client are exchanged."""
    node = 100 + context.node_config["partition-id"]
    labels = torch.arange(90) % tiny.CLASSES
    inputs = 4 * torch.eye(tiny.CLASSES, tiny.PIXELS)[labels]
    inputs += torch.randn(inputs.shape, generator=torch.Generator().manual_seed(node))
    return [(inputs, (labels + 1) % tiny.CLASSES if node == BAD else labels)]


def heads(recipe, folder, **settings):
    """The stages of one round that fit a head, and the run's model."""
    federation = tiny.federation(CLIENTS, tiny.make_app([basin(model=tiny.own_net, data=examples)]))
    settings = {"fraction_evaluate": 0.0, "min_train_nodes": CLIENTS, "align": "off", "folder": str(folder)} | settings
    result = running.run(federation, tiny.net(), 1, recipe=recipe, **settings)
    return [stage for stage in result.reports[0].stages if stage.stage == "head"], result


@pytest.mark.parametrize("recipe", FITTING)
def test_labels_that_contradict_the_others_are_refused_in_every_recipe_with_a_head(recipe, tmp_path):
    (stage,), _ = heads(recipe, tmp_path)
    assert {c.node_id: c.outcome for c in stage.clients} == {
        100 + client: "out_of_line" if 100 + client == BAD else "accepted" for client in range(CLIENTS)
    }
    (refused,) = (client for client in stage.clients if client.node_id == BAD)
    assert "other classes" in refused.detail


def test_without_bounds_nobody_is_judged(tmp_path):
    (stage,), _ = heads("head", tmp_path, bounds=False)
    assert {client.outcome for client in stage.clients} == {"accepted"}
