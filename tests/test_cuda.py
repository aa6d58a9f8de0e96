"""Models on a GPU: what fedbasin gives for them is what it gives on the CPU, and stays on their device."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedbasin.client import basin
from fedbasin.strategies.alignment.graph_matching import match_graph
from fedbasin.strategies.alignment.learned_matching import Search, match_learned
from fedbasin.strategies.alignment.matchers import Matcher
from fedbasin.strategies.alignment.sinkhorn import match_sinkhorn
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.diagnostics.loss_path import barrier
from fedbasin.strategies.fusion.accumulator import fuse
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.tensors.state import floating
from tests import adapted, running, tiny
from tests.tasks import EXAMPLES

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
    # torch says so at the first product of a thread, and goes on.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

WHOLE = [name for name, recipe in RECIPES.items() if recipe.lora is None]
ADAPTING = [name for name, recipe in RECIPES.items() if recipe.lora]
INPUTS = torch.zeros(2, 4)
TASKS = ["classes", "regression", "labels", "pixels", "steps", "text"]


def on_cuda(state):
    return {name: tensor.cuda() for name, tensor in state.items()}


def app_of(example, device):
    """An app that trains on the CPU, so that both devices begin from one model, and whose mod works on the device."""
    app = ClientApp(
        mods=[
            basin(
                model=lambda _: example.model(7).to(device),
                data=lambda context: [example.data(context.node_config["partition-id"])],
                task=example.task,
            )
        ]
    )

    @app.train()
    def train(message, context):
        model = example.model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        loss = example.train(model, context.node_config["partition-id"])
        metrics = MetricRecord({"loss": loss, "num-examples": 16})
        return message.__class__(
            RecordDict({"model": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message
        )

    return app


def run(name, recipe, device, folder, inputs=None, **config):
    example = EXAMPLES[name]
    settings = {"fraction_evaluate": 0.0, "folder": str(folder), "barrier_points": 3} | config
    federation = tiny.federation(3, app_of(example, device), recipe=recipe, **settings)
    return running.run(federation, example.model(), 2, example=inputs)


@pytest.mark.parametrize("recipe", WHOLE)
@pytest.mark.parametrize("name", ["classes", "text"])
def test_a_client_on_a_gpu_replies_as_one_on_a_cpu(name, recipe, tmp_path):
    expected, actual = (run(name, recipe, device, tmp_path / device, align="off") for device in ("cpu", "cuda"))
    for report in actual.reports:
        assert {client.outcome for stage in report.stages for client in stage.clients} == {"accepted"}
    for key, tensor in floating(expected.state_dict).items():
        # Rounding differs, and with it a label that is drawn now and then.
        torch.testing.assert_close(actual.state_dict[key], tensor, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("recipe", ADAPTING)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_on_a_gpu_are_fused_as_on_a_cpu(recipe, tmp_path):
    expected, actual = (
        running.run(
            adapted.federation(app=adapted.make_app(device=device), folder=str(tmp_path / device), recipe=recipe),
            adapted.server_model(),
            2,
        )
        for device in ("cpu", "cuda")
    )
    for report in actual.reports:
        assert {client.outcome for stage in report.stages for client in stage.clients} == {"accepted"}
    for key, tensor in expected.state_dict.items():
        torch.testing.assert_close(actual.state_dict[key], tensor, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_measured_on_a_gpu(name, tmp_path):
    reports = [run(name, "auto", device, tmp_path / device, align="off").reports[0] for device in ("cpu", "cuda")]
    expected, actual = (torch.tensor(report.path.loss_after) for report in reports)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    "config",
    [
        *({"align": "client", "matcher": m, "start": s} for m in Matcher.__members__ for s in ("shared", "own")),
        *({"align": "server", "matcher": m} for m in ("weights", "sinkhorn", "graph")),
    ],
    ids=lambda config: "-".join(config.values()),
)
def test_every_matcher_runs_with_clients_on_a_gpu(config, tmp_path):
    result = run("classes", "regmean" if config["align"] == "client" else "fedavg", "cuda", tmp_path, INPUTS, **config)
    for report in result.reports:
        assert {client.outcome for stage in report.stages for client in stage.clients} == {"accepted"}


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def batches():
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return [(inputs, inputs[:, :4].argmax(1))]


def clients():
    model = network()
    symmetry = discover(model, torch.zeros(2, 6)).symmetry
    anchor = copy.deepcopy(model.state_dict())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return symmetry, anchor, model.state_dict()


@pytest.mark.parametrize("match", [match_weights, match_sinkhorn, match_graph])
def test_matching_finds_the_same_on_a_gpu(match):
    symmetry, anchor, client = clients()
    expected = match(symmetry, anchor, client).state
    actual = match(symmetry, on_cuda(anchor), on_cuda(client)).state
    for name, tensor in expected.items():
        assert actual[name].is_cuda
        torch.testing.assert_close(actual[name].cpu(), tensor)


def test_a_learned_match_runs_on_a_gpu():
    symmetry, anchor, client = clients()
    found = match_learned(
        symmetry, network().cuda(), on_cuda(anchor), on_cuda(client), batches(), search=Search(steps=5)
    )
    model = network().cuda()
    model.load_state_dict({**found.state})
    assert all(tensor.is_cuda for tensor in found.state.values())


def test_models_on_a_gpu_are_fused_and_compared_there():
    _, anchor, client = clients()
    matrix = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    grams = [{("3.weight",): Gram(matrix[rows].mT @ matrix[rows])} for rows in (slice(20), slice(20, 40))]
    updates = [Update(anchor, 1.0, grams[0]), Update(client, 3.0, grams[1])]
    moved = [
        replace(
            u, parameters=on_cuda(u.parameters), precisions={b: Gram(p.matrix.cuda()) for b, p in u.precisions.items()}
        )
        for u in updates
    ]
    expected, actual = fuse(anchor, updates), fuse(on_cuda(anchor), moved)
    for name, tensor in expected.items():
        assert actual[name].is_cuda
        torch.testing.assert_close(actual[name].cpu(), tensor)
    on_cpu = barrier(network(), anchor, client, batches(), 5)
    on_gpu = barrier(network().cuda(), on_cuda(anchor), on_cuda(client), batches(), 5)
    assert on_gpu.linear == pytest.approx(on_cpu.linear, rel=1e-3)


def test_discovery_is_that_of_the_cpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = discover(network(), torch.zeros(2, 6))
        actual = discover(network().cuda(), torch.zeros(2, 6).cuda())
    assert str(actual.symmetry) == str(expected.symmetry)


def test_a_symmetry_is_proven_on_a_gpu():
    model = network().cuda()
    symmetry = discover(model, torch.zeros(2, 6).cuda()).symmetry
    assert check(model, symmetry, torch.randn(8, 6).cuda()).passed


def test_a_server_derives_its_symmetry_from_a_model_on_a_gpu(tmp_path):
    torch.manual_seed(0)
    model = EXAMPLES["classes"].model().cuda()
    federation = tiny.federation(3, app_of(EXAMPLES["classes"], "cuda"), folder=str(tmp_path), fraction_evaluate=0.0)
    result = running.run(federation, model, 1, example=torch.zeros(2, 4).cuda())
    (report,) = result.reports
    assert {client.outcome for stage in report.stages for client in stage.clients} == {"accepted"}
