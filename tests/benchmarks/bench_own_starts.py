"""Transformers of one round whose clients never shared a start: what alignment makes of their mean.

Takes about half an hour: a learned pair takes ten seconds, and eight clients make 21 of them.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedbasin.strategies.alignment.learned_matching import Search, match_learned
from fedbasin.strategies.alignment.pairwise_merging import Link, Links, MergedModel, chain, tree
from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.discover.rotation import rotate_residual
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State
from tests.benchmarks.figures import Figure, Goal, Say
from tests.strategies.symmetry.families import Transformer

EPOCHS = 40
TRAINED = 1400  # of 1797 digits; the others test
HEADS = 4
BATCH = 128
SEEDS = {4: (0, 1), 8: (0,)}  # by number of clients
STEPS = 400

HOW = f"""Digits as 8 rows of 8 pixels, {TRAINED} to train on, split evenly at random; a pre-norm transformer of two blocks and
width 32, trained by each client from an independent initialisation for {EPOCHS} epochs in batches of 32: SGD at 0.05 with momentum
0.9, AdamW at 0.002. Then one round. Test accuracy; mean of {len(SEEDS[4])} seeds with 4 clients, {len(SEEDS[8])} with 8. `star`: everyone aligns to the first client,
`chain` and `tree` as in `strategies/alignment/pairwise_merging.py`; `weights` is `match_weights` with a rotating residual stream,
`learned` is `match_learned` with {STEPS} steps and smoothed labels on the client's own data. In a tree one client aligns a merge, on its own data
alone. `ensemble` averages the clients' probabilities and is no single model."""

COLUMNS = (
    "clients, optimiser",
    *("client", "FedAvg", "star, weights", "chain, weights", "tree, weights"),
    *("star, learned", "chain, learned", "tree, learned", "ensemble"),
)

Batches = Iterable[tuple[Tensor, Tensor]]


def follow(links: Links, ask: Callable[[Link], MergedModel | None]) -> MergedModel | None:
    """Ask for every link in turn; returns the merge, or None if nobody could answer."""
    try:
        link = next(links)
        while True:
            link = links.send(ask(link))
    except StopIteration as end:
        return end.value


@dataclass(frozen=True)
class Shuffled:
    """Batches in a new order each time that they are read."""

    images: Tensor
    labels: Tensor

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(len(self.labels)).split(BATCH):
            yield self.images[batch], self.labels[batch]


@dataclass(frozen=True)
class Digits:
    """Some clients' shares of the training set, and the test set."""

    clients: int
    seed: int

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        scaled = torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8)
        return scaled[order], torch.tensor(labels)[order]

    def share(self, node: int) -> tuple[Tensor, Tensor]:
        images, labels = self._all
        order = np.random.RandomState(self.seed).permutation(TRAINED)
        own = torch.tensor(np.array_split(order, self.clients)[node])
        return images[own], labels[own]

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        images, labels = self._all
        return images[TRAINED:], labels[TRAINED:]


def train(
    model: nn.Module, images: Tensor, labels: Tensor, optimiser: str, seed: int, epochs: int
) -> dict[str, Tensor]:
    """A client's own model, trained; the seed is of the order of its batches."""
    torch.manual_seed(seed)
    if optimiser == "SGD":
        steps: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    else:
        steps = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(32):
            steps.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            steps.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@dataclass(frozen=True, eq=False)
class Round:
    """One round of clients that never shared a start."""

    digits: Digits
    models: list[dict[str, Tensor]]
    symmetry: Symmetry
    model: nn.Module

    def accuracy(self, state: State) -> float:
        images, labels = self.digits.test
        with torch.no_grad():
            found = functional_call(self.model, dict(state), (images,)).argmax(1)
        return float((found == labels).double().mean())

    def ensemble(self) -> float:
        images, labels = self.digits.test
        with torch.no_grad():
            votes = [functional_call(self.model, m, (images,)).softmax(1) for m in self.models]
        return float((torch.stack(votes).sum(0).argmax(1) == labels).double().mean())

    def mean(self, align: Callable[[State, State], State] | None = None) -> float:
        moved = [m if align is None else align(self.models[0], m) for m in self.models]
        return self.accuracy({name: torch.stack([m[name] for m in moved]).mean(0) for name in moved[0]})

    def star_learned(self, steps: int) -> float:
        first, *others = range(len(self.models))
        moved = [self.own(first), *(self.learned(Link(k, self.own(first)), steps) for k in others)]
        merged = moved[0]
        for other in moved[1:]:
            merged = merged.combine(other)
        return self.accuracy(merged.model)

    def own(self, node: int) -> MergedModel:
        model = self.symmetry.fold(self.models[node])
        return MergedModel(model, float(len(self.digits.share(node)[1])), (node,))

    def by_weights(self, link: Link) -> MergedModel:
        moving = link.moving or self.own(link.node)
        if link.anchor is None:
            return moving
        found = match_weights(self.symmetry, link.anchor.model, moving.model)
        return MergedModel(found.state, moving.examples, moving.nodes)

    def learned(self, link: Link, steps: int) -> MergedModel:
        moving = link.moving or self.own(link.node)
        if link.anchor is None:
            return moving
        torch.manual_seed(link.node)
        place = moving.examples / (moving.examples + link.anchor.examples)
        found = match_learned(
            self.symmetry,
            self.model,
            link.anchor.model,
            moving.model,
            Shuffled(*self.digits.share(link.node)),
            place,
            Search(steps),
        )
        return MergedModel(found.state, moving.examples, moving.nodes)

    def merged(self, order: Callable[[range], Links], steps: int = 0) -> float:
        ask = (lambda link: self.learned(link, steps)) if steps else self.by_weights
        found = follow(order(range(len(self.models))), ask)
        if found is None:
            raise RuntimeError("no client answered: nothing was merged")
        return self.accuracy(found.model)


def fresh(seed: int) -> nn.Module:
    """A client's own start."""
    torch.manual_seed(seed)
    return Transformer(heads=HEADS)


def begin(clients: int, optimiser: str, seed: int, epochs: int = EPOCHS) -> Round:
    """Train the clients of one round."""
    digits = Digits(clients, seed)
    models = [
        train(fresh(200 + 10 * seed + node), *digits.share(node), optimiser, node, epochs) for node in range(clients)
    ]
    return Round(digits, models, rotating(Transformer(heads=HEADS)), Transformer(heads=HEADS))


def rotating(model: nn.Module) -> Symmetry:
    """The symmetry of a transformer on rows of digits, with its residual stream rotating."""
    example = torch.zeros(2, 8, 8)
    return rotate_residual(model, discover(model, example).symmetry, example)


def figures(begun: Round, steps: int = STEPS) -> tuple[float, ...]:
    """A row of the table."""
    symmetry = begun.symmetry
    return (
        statistics.mean(begun.accuracy(model) for model in begun.models),
        begun.mean(),
        begun.mean(lambda anchor, model: match_weights(symmetry, anchor, model).state),
        *(begun.merged(order) for order in (chain, tree)),
        begun.star_learned(steps),
        *(begun.merged(order, steps) for order in (chain, tree)),
        begun.ensemble(),
    )


def measure(say: Say) -> Figure:
    rows: dict[tuple[int, str], tuple[float, ...]] = {}
    for clients, seeds in SEEDS.items():
        for optimiser in ("SGD", "AdamW"):
            found = []
            for seed in seeds:
                say(f"own starts: {clients} clients, {optimiser}, seed {seed}")
                found.append(figures(begin(clients, optimiser, seed)))
                say("  ".join(f"{c} {v:.3f}" for c, v in zip(COLUMNS[1:], found[-1], strict=True)))
            rows[clients, optimiser] = tuple(map(statistics.mean, zip(*found, strict=True)))
    table = [(f"{c}, {o}", *(f"{v:.3f}" for v in row)) for (c, o), row in rows.items()]
    goals = [
        _goal("star by weights, 4 clients, SGD", 0.82, rows[4, "SGD"][2]),
        _goal("chain or tree learned, 4 clients, SGD", 0.94, max(rows[4, "SGD"][6:8])),
        _goal("chain or tree learned, 4 clients, AdamW", 0.92, max(rows[4, "AdamW"][6:8])),
    ]
    return Figure("Transformers from independent initialisations", HOW, COLUMNS, table, goals)


def _goal(what: str, least: float, found: float) -> Goal:
    return Goal(f"{what}: at least {least:.2f}", f"{found:.3f}", found >= least)
