"""A federation whose clients train in milliseconds: real app, real mod, a network with counters in it."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn.functional import cross_entropy

from fedbasin.client import basin
from fedbasin.strategies.recipes import RECIPES, BlockRefit
from fedbasin.strategies.symmetry.discover.discovery import discover
from tests.federation import Federation

CLASSES = 3
PIXELS = 4
HIDDEN = 6

# Recipes that take a whole model of any kind; the others need adapters, or a network of their own.
OF_ANY_MODEL = [
    name for name, recipe in RECIPES.items() if recipe.lora is None and not isinstance(recipe.refit, BlockRefit)
]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def symmetry():
    return discover(net(), torch.zeros(2, PIXELS)).symmetry


def own_net(context):
    return net(10 + context.node_config["partition-id"])


def examples(context):
    partition = context.node_config["partition-id"]
    draw = torch.Generator().manual_seed(partition)
    inputs = torch.randn(20 + partition, PIXELS, generator=draw)
    return inputs, inputs[:, :CLASSES].argmax(1)


def batches(context):
    return [examples(context)]


def make_app(mods=None, train_mods=None):
    """The app; `app.trained` lists node and round of every training."""
    app = ClientApp(mods=[basin(model=own_net, data=batches)] if mods is None else mods)
    app.trained = []

    @app.train(mods=train_mods)
    def train(message: Message, context: Context) -> Message:
        if context.run_config.get("fail"):
            raise RuntimeError("out of memory")
        server_round = message.content["config"]["server-round"]
        app.trained.append((context.node_id, server_round))
        model, (inputs, targets) = net(), examples(context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        for _ in range(3):
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
        metrics = MetricRecord({"loss": loss.item(), "num-examples": len(targets)})
        content = {"model": ArrayRecord(model.state_dict()), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model, (inputs, targets) = net(), examples(context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        hits = (model.eval()(inputs).argmax(1) == targets).double()
        metrics = MetricRecord({"accuracy": hits.mean().item(), "num-examples": len(targets)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def federation(clients=3, app=None, tamper=None, **config):
    """Clients 100, 101, ...; keywords are settings of fedbasin, with underscores."""
    own = {f"fedbasin.{name.replace('_', '-')}": value for name, value in config.items()}
    settings = {"fedbasin.min-available-nodes": clients, "fedbasin.poll-seconds": 0.001, **own}
    return Federation(app or make_app(), settings, clients, tamper or {})
