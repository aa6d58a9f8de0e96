"""Transformers of one round whose clients never shared a start: alignment, then layers fitted to features.

Everything runs through `FedBasin` and the clients' mod, with the settings that a user would choose. Takes a quarter of an hour.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedbasin.client import basin
from fedbasin.client.refit.regression import regress
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.fusion.update import join, split
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.tensors.state import State
from tests import running
from tests.benchmarks.bench_own_starts import EPOCHS, HEADS, TRAINED, rotating, train
from tests.benchmarks.figures import Figure, Goal, Say
from tests.federation import Federation
from tests.protocol.models import Make, transformer
from tests.protocol.task import Examples, Task
from tests.protocol.training import evaluate

SEEDS = (0, 1)
SPLITS = ("IID", "Dirichlet(0.3)")
CELLS = tuple(product((4, 8), ("SGD", "AdamW"), SPLITS))
# What a first study of feature regression on this setting had reached.
GOALS = {
    (4, "SGD", "IID"): 0.948,
    (4, "SGD", "Dirichlet(0.3)"): 0.913,
    (4, "AdamW", "IID"): 0.936,
    (4, "AdamW", "Dirichlet(0.3)"): 0.929,
    (8, "AdamW", "IID"): 0.931,
    (8, "AdamW", "Dirichlet(0.3)"): 0.937,
}
HEAD, HEAD_RIDGE = ("head.weight", "head.bias"), 1e-3
COLUMNS = (*("clients, optimiser, shares", "client", "FedAvg", "aligned mean", "head only"), *("features", "ensemble"))

HOW = f"""The setting above, with shares drawn evenly or label by label from Dirichlet(0.3), and the mean over the tokens taken
before the last norm; test accuracy after one round, mean of {len(SEEDS)} seeds. FedAvg, the aligned mean and features are `FedBasin` with
`start = "own"` and the recipes `fedavg` and `features`, with `align = "off"` for FedAvg and else `align = "client"`, a rotating
residual stream and `bootstrap = "largest"`. `head only` is the largest client's body with a head in closed form, fitted to the
logits of all clients' models: as far as one gets without fusing a body. `ensemble` is weighted by examples and no single model."""


@dataclass(frozen=True, eq=False)
class Clients:
    """Trained clients of one round.

    Attributes:
        task: the digits.
        shares: indices of each client's examples.
        models: of each client, trained.
        make: the model with the weights of a seed.
    """

    task: Task
    shares: list[Tensor]
    models: list[dict[str, Tensor]]
    make: Callable[[int], nn.Module]

    def examples(self, node: int) -> Examples:
        inputs, labels = self.task.train
        return inputs[self.shares[node]], labels[self.shares[node]]

    def accuracy(self, state: State) -> float:
        model = self.make(0).eval()
        model.load_state_dict(dict(state))
        return evaluate(model, self.task.test)[0]

    @property
    def weights(self) -> list[float]:
        total = sum(map(len, self.shares))
        return [len(share) / total for share in self.shares]

    def ensemble(self) -> float:
        model, votes = self.make(0).eval(), torch.zeros(())
        for weight, state in zip(self.weights, self.models, strict=True):
            model.load_state_dict(state)
            with torch.no_grad():
                votes = votes + weight * model(self.task.test[0]).softmax(1)
        return float((votes.argmax(1) == self.task.test[1]).double().mean())

    def head_only(self) -> float:
        """The largest client's body, with a head that is fitted to the logits of all clients' models."""
        body = self.models[int(np.argmax(self.weights))]
        found = [
            regress(self.make(0), own, body, [HEAD], Target.features, [self.examples(node)])
            for node, own in enumerate(self.models)
        ]
        gram = Gram(torch.stack([sums[HEAD].gram.squeeze(0) for sums in found]).sum(0))
        moment = torch.stack([sums[HEAD].moment for sums in found]).sum(0)
        step = (gram + gram.isotropic(HEAD_RIDGE)).solve(moment)
        return self.accuracy({**body, **split(HEAD, join(HEAD, body) + step, body)})

    def served(self, recipe: str, **settings: str) -> tuple[float, int]:
        """Return the accuracy of the model after one round of `FedBasin`, and the number of its stages."""
        with tempfile.TemporaryDirectory() as folder:
            config = {
                "recipe": recipe,
                "fraction-evaluate": 0.0,
                "poll-seconds": 0.001,
                "min-available-nodes": len(self.models),
                "packed": True,
                "quorum": 1.0,
                "folder": folder,
                **settings,
            }
            keys = {f"fedbasin.{key}": value for key, value in config.items()}
            federation = Federation(self._app(), keys, len(self.models))
            model = self.make(0)
            result = running.run(federation, model, symmetry=rotating(model))
        return self.accuracy(result.state_dict), len(result.reports[0].stages)

    def _app(self) -> ClientApp:
        """Clients that have trained already."""

        def node(context: Context) -> int:
            return int(context.node_config["partition-id"])

        app = ClientApp(mods=[basin(lambda _: self.make(0), lambda c: [self.examples(node(c))])])

        @app.train()
        def answer(message: Message, context: Context) -> Message:
            own = node(context)
            metrics = MetricRecord({"num-examples": len(self.shares[own])})
            arrays = ArrayRecord(self.models[own])
            return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

        return app


def shared_out(split: str, clients: int, seed: int, labels: Tensor) -> list[Tensor]:
    """Indices of each client's examples."""
    draw = np.random.RandomState(seed)
    if split == "IID":
        parts = np.array_split(draw.permutation(len(labels)), clients)
        return [torch.tensor(part) for part in parts]
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in range(10):
        own = np.where(labels.numpy() == label)[0]
        draw.shuffle(own)
        cuts = (np.cumsum(draw.dirichlet([0.3] * clients)) * len(own)).astype(int)[:-1]
        for share, part in zip(shares, np.split(own, cuts), strict=True):
            share += part.tolist()
    return [torch.tensor(share) for share in shares]


def digits() -> Task:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8)[order]
    targets = torch.tensor(labels)[order]
    return Task((inputs[:TRAINED], targets[:TRAINED]), (inputs[TRAINED:], targets[TRAINED:]), 10)


def begin(clients: int, optimiser: str, split: str, seed: int) -> Clients:
    """Train the clients of one round."""
    task = digits()
    inputs, labels = task.train
    shares = shared_out(split, clients, seed, labels)
    make = partial(drawn, transformer(heads=HEADS), task)
    models = [
        train(make(200 + 10 * seed + node), inputs[own], labels[own], optimiser, node, EPOCHS)
        for node, own in enumerate(shares)
    ]
    return Clients(task, shares, models, make)


def drawn(make: Make, task: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make(task)


def figures(clients: Clients) -> tuple[float, ...]:
    """A row of the table."""
    own = {"start": "own", "bootstrap": "largest"}
    return (
        statistics.mean(map(clients.accuracy, clients.models)),
        clients.served("fedavg", align="off", **own)[0],
        clients.served("fedavg", **own)[0],
        clients.head_only(),
        clients.served("features", **own)[0],
        clients.ensemble(),
    )


def measure(say: Say) -> Figure:
    rows = {}
    for cell in CELLS:
        found = []
        for seed in SEEDS:
            found.append(figures(begin(*cell, seed)))
            say(f"own features: {cell}, seed {seed}: {' '.join(f'{v:.3f}' for v in found[-1])}")
        rows[cell] = tuple(map(statistics.mean, zip(*found, strict=True)))
    table = [(", ".join(map(str, c)), *(f"{v:.3f}" for v in row)) for c, row in rows.items()]
    goals = [
        Goal(
            f"features, {', '.join(map(str, cell))}: at least {least:.3f}",
            f"{rows[cell][4]:.3f}",
            rows[cell][4] >= least,
        )
        for cell, least in GOALS.items()
    ]
    return Figure("Transformers from independent initialisations, fitted", HOW, COLUMNS, table, goals)
