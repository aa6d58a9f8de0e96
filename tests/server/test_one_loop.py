"""The law of one loop: Flower's own `Strategy.start` and `FedBasin.start` end in the same bits."""

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from torch import nn
from torch.nn.functional import cross_entropy

from fedbasin.client import basin
from fedbasin.server.exchange.streaming_grid import StreamingGrid
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.server_optimizers import SERVER_OPTIMIZERS
from tests.federation import Federation

ONE_STAGE = [name for name, recipe in RECIPES.items() if recipe.refit is None and not recipe.points]


class Tied(nn.Module):
    """Two layers that are one tensor, and a counter."""

    def __init__(self, adapters: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        if adapters:
            self.head = Adapted(self.head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.relu(self.first(x)))
        return self.head(torch.relu(self.second(x)))


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, under peft's names."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def make_model(recipe: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Tied(adapters=RECIPES[recipe].lora is not None)


def make_data(context: Context) -> list[tuple[torch.Tensor, torch.Tensor]]:
    partition = context.node_config["partition-id"]
    draw = torch.Generator().manual_seed(partition)
    inputs = torch.randn(20 + partition, 6, generator=draw)
    return [(inputs, inputs[:, :3].argmax(1))]


def make_app(recipe: str) -> ClientApp:
    app = ClientApp(mods=[basin(model=lambda: make_model(recipe), data=make_data)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = make_model(recipe)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        frozen = message.content["config"].get("frozen-factor", "never")
        ((inputs, targets),) = make_data(context)
        for _ in range(3):
            model.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            for name, parameter in model.named_parameters():
                if frozen not in name:
                    parameter.data -= 0.3 * parameter.grad
        metrics = MetricRecord({"num-examples": len(targets)})
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        del context
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def final_arrays(recipe, optimizer, tmp_path, start, robust=""):
    federation = Federation(make_app(recipe), {}, clients=3)
    model = make_model(recipe)
    strategy = FedBasin(
        recipe,
        model=model,
        example=None if RECIPES[recipe].lora else torch.zeros(2, 6),
        server_optimizer=optimizer,
        robust=robust,
        min_train_nodes=3,
        folder=tmp_path,
        poll_seconds=0.01,
    )
    grid = StreamingGrid(federation.grid(), poll_seconds=0.01)
    return start(strategy, grid, ArrayRecord(model.state_dict()), 3).arrays


CASES = [
    *((recipe, "") for recipe in ONE_STAGE),
    *(("fedavg", optimizer) for optimizer in SERVER_OPTIMIZERS),
    *(("fisher", optimizer) for optimizer in ("momentum", "yogi")),
]
ROBUST = [("fedavg", "median"), ("fisher", "geometric-median"), ("lora-rotated", "norm-clipping"), ("lorm", "median")]


@pytest.mark.parametrize(
    ("recipe", "optimizer", "robust"),
    [*((*case, "") for case in CASES), *((recipe, "", robust) for recipe, robust in ROBUST)],
)
def test_flowers_loop_and_ours_end_in_the_same_bits(recipe, optimizer, robust, tmp_path):
    ours = final_arrays(recipe, optimizer, tmp_path / "a", FedBasin.start, robust)
    flowers = final_arrays(recipe, optimizer, tmp_path / "b", Strategy.start, robust)
    initial = ArrayRecord(make_model(recipe).state_dict())
    assert {n: a.data for n, a in ours.items()} == {n: a.data for n, a in flowers.items()}
    assert {n: a.data for n, a in ours.items()} != {n: a.data for n, a in initial.items()}


@pytest.mark.parametrize("recipe", ONE_STAGE)
def test_tied_tensors_stay_tied(recipe, tmp_path):
    arrays = final_arrays(recipe, "", tmp_path, FedBasin.start).to_torch_state_dict()
    assert torch.equal(arrays["first.weight"], arrays["second.weight"])


@pytest.mark.parametrize("recipe", ["regmean", "kfac"])
def test_flowers_loop_trains_on_a_closed_form_and_says_that_nothing_is_compared(recipe, tmp_path, caplog):
    with caplog.at_level("INFO", "flwr.fedbasin"):
        closed = final_arrays(recipe, "", tmp_path / "a", Strategy.start)
    assert f"recipe {recipe} compares no models: Flower's own loop" in caplog.text
    averaged = final_arrays("fedavg", "", tmp_path / "b", Strategy.start)
    assert closed["first.weight"].data != averaged["first.weight"].data


def test_a_server_optimizer_makes_a_difference(tmp_path):
    averaged = final_arrays("fedavg", "", tmp_path / "a", FedBasin.start)
    momentum = final_arrays("fedavgm", "", tmp_path / "b", FedBasin.start)
    assert averaged["first.weight"].data != momentum["first.weight"].data
