"""Networks that take the place of an app's own, in real runs: frozen parts stay, last layers are solved."""

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn.functional import cross_entropy

from fedbasin import RandomFeatures, basin
from tests import running, tiny

CLASSES, SIDE = 3, 6
NETWORKS = {"RandomFeatures": RandomFeatures}


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def images(seed, count=60):
    """Return images of which a corner is brighter, and its number."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    pixels = torch.randn(count, 1, SIDE, SIDE, generator=draw)
    for corner in range(CLASSES):
        rows, columns = 3 * (corner // 2), 3 * (corner % 2)
        pixels[labels == corner, :, rows : rows + 3, columns : columns + 3] += 1.5
    return pixels, labels


def app_of(make, shares):
    app = ClientApp(mods=[basin(model=make, data=lambda context: [shares[context.node_config["partition-id"]]])])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, (inputs, targets) = make(), shares[context.node_config["partition-id"]]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        metrics = MetricRecord({"num-examples": len(targets)})
        return Message(RecordDict({"model": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def run(make, shares, folder, rounds=1, **settings):
    federation = tiny.federation(
        len(shares), app_of(make, shares), fraction_evaluate=0.0, folder=str(folder), **settings
    )
    return running.run(federation, make(), rounds)


def accuracy(make, result):
    net, (inputs, targets) = make(), images(99, 400)
    net.load_state_dict(result.state_dict)
    return float((net.eval()(inputs).argmax(1) == targets).double().mean())


@pytest.fixture(params=NETWORKS)
def make(request):
    return lambda: NETWORKS[request.param](64, CLASSES, 64, body=backbone())


@pytest.mark.parametrize("recipe", ["head", "auto"])
def test_the_last_layer_is_solved_on_a_frozen_body(make, recipe, tmp_path):
    shares = [images(seed) for seed in range(4)]
    result = run(make, shares, tmp_path, recipe=recipe)
    assert "head" in [stage.stage for stage in result.reports[0].stages]
    # A quarter of the examples that a client trains on says little; all of them together tell corners apart.
    assert accuracy(make, result) > 0.8
    start = make().state_dict()
    changed = [name for name, tensor in result.state_dict.items() if not torch.equal(tensor, start[name])]
    assert changed == ["head.weight", "head.bias"]


def test_how_clients_share_the_examples_decides_nothing(make, tmp_path):
    inputs, targets = images(0, 200)
    by_class = targets.argsort()
    splits = {
        "one": [torch.arange(200)],
        "alike": list(torch.arange(200).split(50)),
        "by class": list(by_class.split(67)),
    }
    results = {
        name: run(
            make,
            [(inputs[rows], targets[rows]) for rows in parts],
            tmp_path / name.replace(" ", "-"),
            recipe="head",
            min_train_nodes=1,
            min_evaluate_nodes=1,
        ).state_dict
        for name, parts in splits.items()
    }
    for state in results.values():
        torch.testing.assert_close(state["head.weight"], results["one"]["head.weight"], rtol=1e-3, atol=1e-4)
