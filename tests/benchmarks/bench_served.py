"""Round by round: plain averaging and `auto-head` on the network of Flower's PyTorch quickstart, at four learning rates.

The clients' digits are colour images of 32 x 32; the app is the quickstart's, with SGD and momentum .9.
"""

import statistics
import tempfile
from functools import cache
from itertools import product

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from fedbasin.client import basin
from fedbasin.server.run.result import RunResult
from tests import running
from tests.benchmarks.figures import Figure, Goal, Say
from tests.federation import Federation
from tests.quickstart.task import Net, train

CLIENTS, BATCH, ROUNDS, TEST = 4, 32, 20, 360
RATES = (0.005, 0.02, 0.1, 0.3)
SEEDS = (0, 1, 2)
RECIPES = ("fedavg", "auto-head")


@cache
def colour_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits as colour images of 32 x 32 with numbers from -1 to 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    return interpolate(pixels, (32, 32), mode="bilinear").repeat(1, 3, 1, 1), torch.tensor(labels)


def make_app(seed: int, rate: float) -> ClientApp:
    """Return the quickstart's app with the mod: every client trains for one epoch a round."""
    order = torch.randperm(len(colour_digits()[1]), generator=torch.Generator().manual_seed(seed))[TEST:]

    def batches(context: Context) -> list[dict[str, Tensor]]:
        own = order.chunk(CLIENTS)[int(context.node_config["partition-id"])]
        images, labels = colour_digits()
        return [{"img": images[part], "label": labels[part]} for part in own.split(BATCH)]

    app = ClientApp(mods=[basin(Net, batches)])

    @app.train()
    def train_app(message: Message, context: Context) -> Message:
        model, loader = Net(), batches(context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        loss = train(model, loader, 1, rate, torch.device("cpu"))
        examples = sum(len(batch["label"]) for batch in loader)
        metrics = MetricRecord({"train_loss": loss, "num-examples": examples})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def run(recipe: str, rate: float, seed: int, rounds: int = ROUNDS, **settings: object) -> RunResult:
    """Run one cell; every report has accuracy and loss of the served model on 360 test images."""
    images, labels = colour_digits()
    test = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:TEST]

    @torch.no_grad()
    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        model = Net()
        model.load_state_dict(arrays.to_torch_state_dict())
        outputs = model.eval()(images[test])
        accuracy = (outputs.argmax(1) == labels[test]).double().mean().item()
        return MetricRecord({"accuracy": accuracy, "loss": cross_entropy(outputs, labels[test]).item()})

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = {"fedbasin.folder": folder, "fedbasin.poll-seconds": 0.001, "fedbasin.min-available-nodes": CLIENTS}
        federation = Federation(make_app(seed, rate), {**config, "fedbasin.fraction-evaluate": 0.0}, CLIENTS)
        return running.run(federation, Net(), rounds, recipe=recipe, evaluate_fn=evaluate, **settings)


def measure(say: Say) -> Figure:
    """Return the figure."""
    curves = {}
    for rate, recipe, seed in product(RATES, RECIPES, SEEDS):
        result = run(recipe, rate, seed)
        curves[rate, recipe, seed] = [(r.server_metrics["accuracy"], r.server_metrics["loss"]) for r in result.reports]
        say(f"rate {rate}, {recipe}, seed {seed}: {curves[rate, recipe, seed][-1]}")
    rows, below = [], 0
    for rate, recipe in product(RATES, RECIPES):
        means = [
            [statistics.fmean(curves[rate, recipe, seed][number][kind] for seed in SEEDS) for number in range(ROUNDS)]
            for kind in (0, 1)
        ]
        shown = [f"{means[0][r - 1]:.3f} / {means[1][r - 1]:.3f}" for r in (1, 2, 3, 5, 10, 20)]
        rows.append([f"{rate}, {recipe}", *shown])
    return Figure("", "", [], rows, Goal("", below == 0))
