"""Running statistics of BatchNorm after models that share no start were aligned and mixed."""

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from fedbasin.client import basin
from fedbasin.strategies.diagnostics.evaluation import evaluate
from tests import running, tiny
from tests.federation import Federation

CLIENTS = 4
IMAGES, LABELS = (torch.tensor(values) for values in load_digits(return_X_y=True))
IMAGES = IMAGES.float() / 8 - 1
TEST = slice(1400, None)


def net(seed=0):
    torch.manual_seed(seed)
    hidden = [layer for width in (64, 128) for layer in (nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def own_net(context):
    return net(1 + context.node_config["partition-id"])


def batches(context):
    part = slice(context.node_config["partition-id"], 1400, CLIENTS)
    return list(zip(IMAGES[part].split(50), LABELS[part].split(50), strict=True))


def make_app():
    app = ClientApp(mods=[basin(own_net, batches)])

    @app.train()
    def train(message, context):
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for inputs, targets in 6 * batches(context):
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 350})}
        return Message(RecordDict(content), reply_to=message)

    return app


def one_round(folder, **settings):
    config = {"fedbasin.folder": str(folder), "fedbasin.poll-seconds": 0.001, "fedbasin.fraction-evaluate": 0.0}
    federation = Federation(make_app(), config, CLIENTS)
    return running.run(federation, net(), example=torch.zeros(2, 64), start="own", min_available_nodes=4, **settings)


def score(result):
    loss, correct, examples = evaluate(net(), result.state_dict, [(IMAGES[TEST], LABELS[TEST])])
    return loss / examples, correct / examples


@pytest.mark.parametrize("merge", ["star", "chain"])
def test_measuring_them_anew_repairs_what_mixing_has_broken(tmp_path, monkeypatch, merge):
    result = one_round(tmp_path / "measured", merge=merge)
    assert [stage.stage for stage in result.reports[0].stages][-1] == "measure"
    monkeypatch.setattr("fedbasin.server.run.composition.find_norms", lambda model: ())
    pooled = one_round(tmp_path / "pooled", merge=merge)
    (loss, accuracy), (pooled_loss, pooled_accuracy) = score(result), score(pooled)
    assert loss < pooled_loss
    # A chain mixes two models at a time, and its accuracy is nearly whole as it is.
    assert merge == "chain" or accuracy > pooled_accuracy
    weights = {name for name in result.state_dict if "running" not in name}
    assert all(torch.equal(result.state_dict[name], pooled.state_dict[name]) for name in weights)


def test_a_first_norm_has_the_moments_of_all_clients_data(tmp_path):
    federation = tiny.federation(folder=str(tmp_path), start="own", fraction_evaluate=0.0)
    state = running.run(federation, tiny.net(), symmetry=tiny.symmetry()).state_dict
    inputs = torch.cat([tiny.examples(context)[0] for context in federation.contexts.values()])
    hidden = nn.functional.linear(inputs, state["0.weight"], state["0.bias"])
    torch.testing.assert_close(state["1.running_mean"], hidden.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["1.running_var"], hidden.var(0, unbiased=False), rtol=1e-4, atol=1e-5)


def test_clients_that_cannot_measure_leave_the_pooled_statistics(tmp_path):
    federation = tiny.federation(app=tiny.make_app(mods=[basin(tiny.own_net)]), folder=str(tmp_path), start="own")
    (report,) = running.run(federation, tiny.net(), symmetry=tiny.symmetry()).reports
    measured = next(stage for stage in report.stages if stage.stage == "measure")
    assert not measured.accepted
