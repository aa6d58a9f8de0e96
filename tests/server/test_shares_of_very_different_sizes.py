"""A client with far more data than the others makes a longer update, and has its part in every round."""

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import cross_entropy

from fedbasin.client import basin
from tests import running, tiny

LARGE = 100


def examples(context):
    """Three classes that overlap: 16 examples, and 800 for one client."""
    node = 100 + context.node_config["partition-id"]
    size = 800 if node == LARGE else 16
    draw = torch.Generator().manual_seed(node)
    labels = torch.randint(tiny.CLASSES, (size,), generator=draw)
    inputs = torch.eye(tiny.CLASSES, tiny.PIXELS)[labels] + torch.randn(size, tiny.PIXELS, generator=draw)
    return inputs, labels


def app():
    """An app that takes one small step for each eight examples, as apps do that train for an epoch."""
    made = ClientApp(mods=[basin(model=tiny.own_net, data=lambda context: [examples(context)])])

    @made.train()
    def train(message, context):
        model, (inputs, labels) = tiny.net(), examples(context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for batch, targets in zip(inputs.split(8), labels.split(8), strict=True):
            optimizer.zero_grad()
            loss = cross_entropy(model(batch), targets)
            loss.backward()
            optimizer.step()
        metrics = MetricRecord({"loss": loss.item(), "num-examples": len(labels)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return made


def outcomes(recipe, clients, folder, tamper=None):
    """The report of the large client, and the names of all outcomes, of the stage in which clients train."""
    settings = {"fraction_evaluate": 0.0, "min_train_nodes": clients, "align": "off", "folder": str(folder)}
    federation = tiny.federation(clients, app(), tamper)
    result = running.run(federation, tiny.net(), 1, recipe=recipe, **settings)
    stage = result.reports[0].stages[0]
    (large,) = (client for client in stage.clients if client.node_id == LARGE)
    return large, {client.outcome for client in stage.clients}


@pytest.mark.parametrize("clients", [3, 5, 10])
@pytest.mark.parametrize("recipe", ["fedavg", "regmean", "features", "auto"])
def test_it_is_cut_back_and_not_refused_and_counts_more_where_clients_compare(recipe, clients, tmp_path):
    large, others = outcomes(recipe, clients, tmp_path)
    assert others == {"accepted"}
    assert "examples cut from 800 to " + ("192" if recipe == "auto" else "80") in large.detail
    assert "update norm cut" in large.detail


def test_one_that_is_as_long_and_points_elsewhere_is_refused(tmp_path):
    def turn(reply):
        start = tiny.net().state_dict()
        arrays = reply.content["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord({name: 2 * start[name] - tensor for name, tensor in arrays.items()})
        return reply

    large, _ = outcomes("auto", 10, tmp_path, {LARGE: turn})
    assert large.outcome == "out_of_line"
    assert "norm of its update" in large.detail
