"""One round where labels are skewed: what each way to fuse keeps of clients that trained for long."""

import statistics
from collections.abc import Callable, Iterator, Mapping

import torch

from tests.benchmarks.figures import Figure, Goal, Say
from tests.one_round import CLIENTS, one_round

SEEDS = (0, 1, 2, 3, 4)
STARTS = {
    "shared initialisation": ("off", "shared", {}),
    "independent": ("client", "own", {}),
    "independent, by activations": (
        "client",
        "own",
        {"fedbasin.matcher": "activations", "fedbasin.bootstrap": "largest"},
    ),
}
RECIPES = ("fedavg", "regmean", "regmean++", "features", "head")
GOAL = 0.955

HOW = f"""The digits app with {CLIENTS} clients, label shares from Dirichlet(0.3), 40 local epochs of a perceptron 64-256-256-10, one round;
test accuracy of the global model on 540 images, mean of {len(SEEDS)} seeds. Clients from independent initialisations are aligned by weights to the first
of them, or by activations to the one with most examples.
`head` reads labels, the others read none. `ensemble` averages the clients' probabilities and is no single model."""

Rates = dict[str, float]


def rates(start: str, seed: int) -> Rates:
    """Test accuracies of one round, by recipe, and of the ensemble."""
    found: Rates = {}
    align, begin, how = STARTS[start]
    for recipe in RECIPES:
        metrics = _metrics(recipe, align, begin, seed, how)
        found[recipe] = metrics["test-accuracy"]
        found["ensemble"] = metrics["ensemble-accuracy"]
    if begin == "own" and not how:
        found["not aligned"] = _metrics("fedavg", "off", begin, seed, how)["test-accuracy"]
    return found


def _metrics(recipe: str, align: str, start: str, seed: int, how: Mapping[str, str]) -> Rates:
    app = {"width": 256, "epochs": 40, "batch_size": 32, "alpha": 0.3, **how}
    (report,) = one_round(recipe, align, start, seed, **app).reports
    return dict(report.metrics)


def runs(say: Say) -> Iterator[tuple[str, Rates]]:
    """Means and lowest of the seeds, by start."""
    for start in STARTS:
        found = []
        for seed in SEEDS:
            found.append(rates(start, seed))
            say(f"one round: {start}, seed {seed}: " + _line(found[-1]))
        for what, of in (("mean", statistics.mean), ("lowest seed", min)):
            yield f"{start}, {what}", _over(found, of)


def _over(found: list[Rates], of: Callable[[list[float]], float]) -> Rates:
    return {name: of([each[name] for each in found]) for name in found[0]}


def _line(found: Rates) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in found.items())


def measure(say: Say) -> Figure:
    torch.set_num_threads(1)
    found = dict(runs(say))
    names = ("not aligned", *RECIPES, "ensemble")
    rows = [(what, *(f"{of[name]:.3f}" if name in of else "" for name in names)) for what, of in found.items()]
    goals = [
        Goal(
            f"`features` reaches {GOAL}, {start}",
            f"{found[f'{start}, mean']['features']:.3f}",
            found[f"{start}, mean"]["features"] >= GOAL,
        )
        for start in STARTS
    ]
    columns = ("", "`fedavg`, not aligned", *(f"`{name}`" for name in RECIPES), "ensemble")
    return Figure("One round of skewed labels", HOW, columns, rows, goals)
