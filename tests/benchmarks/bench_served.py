"""Round by round: plain averaging and `auto` on the network of Flower's PyTorch quickstart, at four learning rates.

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
VALIDATION = 0.2  # of a client's examples, as in the quickstart
RATES = (0.005, 0.02, 0.1, 0.3)
SEEDS = (0, 1, 2)
RECIPES = ("fedavg", "auto")
SHOWN = (1, 2, 3, 5, 10, 15, 20)
COLUMNS = ("learning rate, recipe", *(f"round {number}" for number in SHOWN))

HOW = f"""The small convolutional network of Flower's PyTorch quickstart with its optimizer, SGD with momentum .9, {CLIENTS} clients,
an epoch a round in batches of {BATCH}, digits as colour images of 32 x 32, shares drawn evenly; test accuracy of the served
model on {TEST} images, mean of {len(SEEDS)} seeds. As in the quickstart, clients keep {VALIDATION:.0%} of their images for
evaluation under either recipe; `auto` compares models by them."""


@cache
def colour_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits as colour images of 32 x 32 with numbers from -1 to 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    return interpolate(pixels, (32, 32), mode="bilinear").repeat(1, 3, 1, 1), torch.tensor(labels)


def make_app(seed: int, rate: float) -> ClientApp:
    """Return the quickstart's app with the mod: every client trains for one epoch a round."""
    order = torch.randperm(len(colour_digits()[1]), generator=torch.Generator().manual_seed(seed))[TEST:]

    def loaders(context: Context) -> tuple[list[dict[str, Tensor]], ...]:
        own = order.chunk(CLIENTS)[int(context.node_config["partition-id"])]
        kept = round(VALIDATION * len(own))
        images, labels = colour_digits()
        return tuple(
            [{"img": images[rows], "label": labels[rows]} for rows in part.split(BATCH)]
            for part in (own[kept:], own[:kept])
        )

    mod = basin(Net, data=lambda context: loaders(context)[0], held_out=lambda context: loaders(context)[1])
    app = ClientApp(mods=[mod])

    @app.train()
    def train_app(message: Message, context: Context) -> Message:
        model, loader = Net(), loaders(context)[0]
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
    """Return the curves, and the rounds in which the served model is behind plain averaging."""
    curves = {}
    for rate, recipe, seed in product(RATES, RECIPES, SEEDS):
        reports = run(recipe, rate, seed).reports
        curves[rate, recipe, seed] = [(r.server_metrics["accuracy"], r.server_metrics["loss"]) for r in reports]
        say(f"rate {rate}, {recipe}, seed {seed}: {curves[rate, recipe, seed][-1]}")
    means = {
        (rate, recipe): [
            tuple(map(statistics.fmean, zip(*(curves[rate, recipe, seed][number] for seed in SEEDS), strict=True)))
            for number in range(ROUNDS)
        ]
        for rate, recipe in product(RATES, RECIPES)
    }
    rows = [
        (f"{rate}, {recipe}", *(f"{means[rate, recipe][number - 1][0]:.3f}" for number in SHOWN))
        for rate, recipe in product(RATES, RECIPES)
    ]
    behind = [
        (plain[0] - served[0], served[1] - plain[1])
        for rate in RATES
        for plain, served in zip(means[rate, "fedavg"], means[rate, "auto"], strict=True)
    ]
    accuracy, loss = (max(values) for values in zip(*behind, strict=True))
    goal = Goal(
        "no round below plain averaging by more than a point, or above it in loss by more than .02",
        f"at most {accuracy:.3f} below in accuracy, {loss:.3f} above in loss",
        accuracy <= 0.01 and loss <= 0.02,
    )
    return Figure("The network of Flower's quickstart, round by round", HOW, COLUMNS, rows, [goal])
