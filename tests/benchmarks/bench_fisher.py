"""The diagonal Fisher information of a client's model against an epoch of its training, by the number of classes."""

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedbasin.strategies.statistics.fisher import diagonal_fisher
from tests.benchmarks.figures import Figure, Goal, Say

CLASSES = (2, 10, 26, 100)
BATCHES, EXAMPLES, REPETITIONS, MOST = 20, 32, 3, 4.0
NETWORKS: dict[str, tuple[tuple[int, ...], Callable[[int], nn.Module]]] = {
    "MLP 784-200": ((784,), lambda classes: nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, classes))),
    "MLP 16-64-64": (
        (16,),
        lambda classes: nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)
        ),
    ),
    "CNN 16-32": (
        (1, 16, 16),
        lambda classes: nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, classes),
        ),
    ),
    "LSTM 32": ((15, 12), lambda classes: _Reader(classes)),
}

HOW = f"""{BATCHES} batches of {EXAMPLES} examples on one core: an epoch of SGD, and the diagonal Fisher information with
its default settings, which is exact up to four classes and draws a label for each example above. Seconds of the
processor, the least of {REPETITIONS} repetitions each, in turns."""


class _Reader(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(12, 32, batch_first=True), nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)[0][:, -1])


def measure(say: Say) -> Figure:
    torch.set_num_threads(1)
    rows, ratios = [], {}
    for name, (shape, make) in NETWORKS.items():
        for classes in CLASSES:
            say(f"fisher: {name}, {classes} classes")
            epoch, fisher = _seconds(make(classes), shape, classes)
            ratios[f"{name}, {classes}"] = fisher / epoch
            rows.append((name, str(classes), f"{1000 * epoch:.1f}", f"{1000 * fisher:.1f}", f"{fisher / epoch:.1f}"))
    goal = Goal(
        f"at most {MOST:g} epochs at any number of classes",
        f"{min(ratios.values()):.1f} to {max(ratios.values()):.1f}, the most for {max(ratios, key=lambda n: ratios[n])}",
        all(ratio <= MOST for ratio in ratios.values()),
    )
    columns = ("network", "classes", "epoch, ms", "Fisher, ms", "ratio")
    return Figure("Fisher information", HOW, columns, rows, [goal])


def _seconds(model: nn.Module, shape: tuple[int, ...], classes: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(EXAMPLES, *shape, generator=generator), torch.randint(classes, (EXAMPLES,), generator=generator))
        for _ in range(BATCHES)
    ]
    optimiser = torch.optim.SGD(model.parameters(), 0.01)

    def train() -> None:
        for inputs, targets in data:
            optimiser.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimiser.step()

    def collect() -> None:
        diagonal_fisher(model, data)

    pairs = [(_cpu(train), _cpu(collect)) for _ in range(REPETITIONS)]
    epochs, fishers = zip(*pairs, strict=True)
    return min(epochs), min(fishers)


def _cpu(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began
