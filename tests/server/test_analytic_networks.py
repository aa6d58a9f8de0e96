"""Networks that take the place of an app's own, in real runs: frozen parts stay, the others are solved."""

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from fedbasin import BucketedFeatures, DeepAnalytic, FedBasin, RandomFeatures, SettingsError, basin
from tests import running, tiny

CLASSES, SIDE = 3, 6
NETWORKS = {network.__name__: network for network in (RandomFeatures, BucketedFeatures, DeepAnalytic)}


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


def app_of(make, shares, loss=cross_entropy):
    app = ClientApp(mods=[basin(model=make, data=lambda context: [shares[context.node_config["partition-id"]]])])
    app.trained = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        app.trained.append(context.node_id)
        model, (inputs, targets) = make(), shares[context.node_config["partition-id"]]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        loss(model(inputs), targets).backward()
        optimizer.step()
        metrics = MetricRecord({"num-examples": len(targets)})
        return Message(RecordDict({"model": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def run(make, shares, folder, rounds=1, *, loss=cross_entropy, tamper=None, **settings):
    settings = {
        "fraction_evaluate": 0.0,
        "folder": str(folder),
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
    } | settings
    federation = tiny.federation(len(shares), app_of(make, shares, loss), tamper, **settings)
    return running.run(federation, make(), rounds)


def stages(report):
    return [stage.stage for stage in report.stages]


def accuracy(make, result):
    net, (inputs, targets) = make(), images(99, 400)
    net.load_state_dict(result.state_dict)
    return float((net.eval()(inputs).argmax(1) == targets).double().mean())


def deep(depth=3):
    return lambda: DeepAnalytic(64, CLASSES, 32, depth, body=backbone())


def deep_of_values():
    return DeepAnalytic(SIDE**2, 2, 32)


def deep_of_products():
    return DeepAnalytic(6, 4, 16)


def products(seed, count=2000):
    """Return numbers of which products decide the class."""
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    larger = inputs[:, :4].reshape(-1, 2, 2).prod(2).argmax(1)
    return inputs, larger + 2 * (inputs[:, 0].abs() > 1).long()


def values(seed, count=80):
    inputs, _ = images(seed, count)
    return inputs, torch.stack([inputs.flatten(1)[:, :3].prod(1), inputs.flatten(1)[:, 4].abs()], 1)


@pytest.fixture(params=NETWORKS)
def make(request):
    return lambda: NETWORKS[request.param](64, CLASSES, 64, body=backbone())


@pytest.mark.parametrize("recipe", ["head", "auto"])
def test_the_last_layer_is_solved_on_a_frozen_body(make, recipe, tmp_path):
    shares = [images(seed) for seed in range(4)]
    result = run(make, shares, tmp_path, recipe=recipe)
    assert "head" in stages(result.reports[0])
    # A quarter of the examples that a client trains on says little; all of them together tell corners apart.
    assert accuracy(make, result) > 0.8
    start = make().state_dict()
    changed = [name for name, tensor in result.state_dict.items() if not torch.equal(tensor, start[name])]
    assert changed == ["head.weight", "head.bias"]


def splits(examples, order):
    inputs, targets = examples
    rows = {"one": [order], "alike": torch.arange(len(order)).chunk(5), "sorted": order.chunk(3)}
    return {name: [(inputs[part], targets[part]) for part in parts] for name, parts in rows.items()}


@pytest.mark.parametrize("recipe", ["head", "deep-analytic"])
@pytest.mark.parametrize("of_values", [True, False])
def test_how_clients_share_the_examples_decides_nothing(of_values, recipe, tmp_path):
    make, examples, loss = (deep_of_values, values(0, 240), mse_loss) if of_values else (deep_of_products, products(0), cross_entropy)  # fmt: skip
    order = examples[1].flatten(1)[:, 0].argsort() if of_values else examples[1].argsort()
    outputs, states = [], []
    for name, shares in splits(examples, order).items():
        # Clients of the sorted split are as far from each other as hostile ones, and would be cut back.
        states.append(run(make, shares, tmp_path / name, recipe=recipe, loss=loss, bounds=False).state_dict)
        net = make()
        net.load_state_dict(states[-1])
        outputs.append(net(examples[0]).detach())
    assert bool(states[0]["blocks.0.fitted.weight"].any()) == (recipe == "deep-analytic")
    # A head that is fitted to values is drawn towards what training has made of it.
    tolerance = 5e-2 if of_values and recipe == "head" else 2e-3
    for further in outputs[1:]:
        assert float((further - outputs[0]).norm() / outputs[0].norm()) < tolerance


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_blocks_are_fitted_in_stages_without_training(depth, tmp_path):
    shares = [images(seed) for seed in range(3)]
    first, second = run(deep(depth), shares, tmp_path, 2, recipe="deep-analytic").reports
    assert stages(first) == stages(second) == ["fuse", *(depth - 1) * ["block"], "head"]
    for stage in first.stages:
        assert [client.outcome for client in stage.clients] == ["accepted"] * 3


def test_a_further_round_gives_the_same(tmp_path):
    shares = [images(seed) for seed in range(3)]
    once, twice = (
        run(deep(), shares, tmp_path / str(rounds), rounds, recipe="deep-analytic").state_dict for rounds in (1, 2)
    )
    torch.testing.assert_close(twice, once, rtol=0, atol=0)


def test_a_stage_that_is_asked_anew_gives_the_same(tmp_path):
    shares, lost = [images(seed) for seed in range(3)], []

    def lose(reply):
        if reply.has_error() or len(lost) > 1:
            return reply
        lost.append(reply)
        return None

    plain = run(deep(), shares, tmp_path / "plain", recipe="deep-analytic").state_dict
    tamper = dict.fromkeys((100, 101), lose)
    again = run(
        deep(), shares, tmp_path / "again", recipe="deep-analytic", tamper=tamper, attempts=2, round_timeout_seconds=1
    )
    torch.testing.assert_close(again.state_dict, plain, rtol=0, atol=0)


def test_a_hostile_client_does_not_decide_blocks_under_a_robust_rule(tmp_path):
    shares = [images(seed) for seed in range(7)]
    turned = [*shares[:-1], (shares[-1][0], (shares[-1][1] + 1) % CLASSES)]
    settings = {"recipe": "deep-analytic", "robust": "geometric-median", "min_train_nodes": 7}
    assert accuracy(deep(), run(deep(), turned, tmp_path, **settings)) > 0.75


def test_sums_in_few_bytes_still_fit_blocks(tmp_path):
    shares = [images(seed) for seed in range(4)]
    result = run(deep(), shares, tmp_path, recipe="deep-analytic", statistics_budget_bytes=4000)
    assert stages(result.reports[0]) == ["fuse", "block", "block", "head"]
    assert accuracy(deep(), result) > 0.6


def test_an_aligned_run_has_the_same_blocks(tmp_path):
    shares = [images(seed) for seed in range(3)]
    settings = {"fraction_evaluate": 0.0, "recipe": "deep-analytic"}
    states = []
    for name, example in (("plain", None), ("traced", torch.zeros(2, 1, SIDE, SIDE))):
        federation = tiny.federation(3, app_of(deep(), shares), folder=str(tmp_path / name), **settings)
        states.append(running.run(federation, deep()(), example=example).state_dict)
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)


def test_another_network_is_refused_before_anybody_trains(tmp_path):
    app = app_of(tiny.net, [])
    federation = tiny.federation(2, app, recipe="deep-analytic", folder=str(tmp_path))
    message = "'deep-analytic' fits the blocks of a fedbasin.DeepAnalytic, and the model is a Sequential; give"
    with pytest.raises(SettingsError, match=message):
        running.run(federation, tiny.net())
    assert not app.trained


def test_a_server_that_aligns_cannot_fit_blocks():
    with pytest.raises(SettingsError, match=r"align = 'server': recipe 'deep-analytic'.*set align = 'client'"):
        FedBasin("deep-analytic", model=deep()(), align="server")
