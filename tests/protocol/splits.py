"""How the training examples are shared out among clients."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tests.protocol.spec import SpecError
from tests.protocol.task import Task

# (task, clients, seed) to the indices of each client's examples.
Split = Callable[[Task, int, int], list[Int[Tensor, "own"]]]

_FEWEST = 2  # a client with a single example cannot train a BatchNorm


def iid() -> Split:
    """Equal shares of a shuffled whole."""

    def split(task: Task, clients: int, seed: int) -> list[Tensor]:
        order = np.random.default_rng(seed).permutation(len(task.train[1]))
        return _kept(np.array_split(order, clients))

    return split


def few(each: int = 5) -> Split:
    """That many examples to a client, at random; the rest is left out."""

    def split(task: Task, clients: int, seed: int) -> list[Tensor]:
        if each * clients > len(task.train[1]):
            raise SpecError(f"few({each}): {clients} clients would need more examples than the task has")
        order = np.random.default_rng(seed).permutation(len(task.train[1]))
        return _kept(list(order[: each * clients].reshape(clients, each)))

    return split


def dirichlet(alpha: float) -> Split:
    """Each label's examples in shares that a Dirichlet(alpha) draws, label by label."""
    if alpha <= 0:
        raise SpecError(f"dirichlet({alpha}): choose a concentration above 0")

    def split(task: Task, clients: int, seed: int) -> list[Tensor]:
        rng, labels = np.random.default_rng(seed), task.labels.numpy()
        shares: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            own = rng.permutation(np.flatnonzero(labels == label))
            cuts = (np.cumsum(rng.dirichlet([alpha] * clients)) * len(own)).astype(int)[:-1]
            for client, part in enumerate(np.split(own, cuts)):
                shares[client].append(part)
        return _kept([np.concatenate(parts) for parts in shares])

    return split


def quantity(alpha: float = 0.3) -> Split:
    """All labels alike, and shares of sizes that a Dirichlet(alpha) draws; each client has two examples at least."""
    if alpha <= 0:
        raise SpecError(f"quantity({alpha}): choose a concentration above 0")

    def split(task: Task, clients: int, seed: int) -> list[Tensor]:
        rng, count = np.random.default_rng(seed), len(task.train[1])
        order = rng.permutation(count)
        sizes = _FEWEST + rng.dirichlet([alpha] * clients) * (count - _FEWEST * clients)
        return _kept(np.split(order, np.cumsum(sizes).astype(int)[:-1]))

    return split


def shards(each: int = 2) -> Split:
    """The examples sorted by label, cut into equal shards, `each` of them to a client (McMahan et al. 2017)."""

    def split(task: Task, clients: int, seed: int) -> list[Tensor]:
        rng, labels = np.random.default_rng(seed), task.labels.numpy()
        shuffled = rng.permutation(len(labels))
        pieces = np.array_split(shuffled[np.argsort(labels[shuffled])], clients * each)
        dealt = rng.permutation(clients * each).reshape(clients, each)
        return _kept([np.concatenate([pieces[piece] for piece in own]) for own in dealt])

    return split


def groups() -> Split:
    """Whole sources to clients in turn: glyphs by font."""

    def split(task: Task, clients: int, seed: int) -> list[Tensor]:
        if task.groups is None:
            raise SpecError("groups: the examples of this task have no source; choose another split")
        group = task.groups.numpy()
        order = np.random.default_rng(seed).permutation(np.unique(group))
        own = [np.isin(group, order[client::clients]) for client in range(clients)]
        return _kept([np.flatnonzero(mine) for mine in own])

    return split


def _kept(parts: list[np.ndarray]) -> list[Tensor]:
    """The clients that have something to train on."""
    return [torch.tensor(part) for part in parts if len(part) >= _FEWEST]


SPLITS: dict[str, Callable[..., Split]] = {
    "iid": iid,
    "few": few,
    "dirichlet": dirichlet,
    "quantity": quantity,
    "shards": shards,
    "groups": groups,
}
