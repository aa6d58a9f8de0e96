"""The memory of a head: what a client sent in an earlier round counts in the rounds that do not sample it.

    m_c, n_c    mean of the inputs of class c in this round's sums, and its number of examples
    r_c, k_c    those in the sums of the remembered clients that were last asked in one earlier round
    w_c         n_c k_c / (n_c + k_c), for the classes that both have
    d           sum_c w_c (m_c - r_c) / sum_c w_c
    rho         correlation of the m_c and the r_c around their means, weighted by w_c

The features of the remembered sums are those of an older model. The sums are moved by d, the mean movement of the
classes, and multiplied by rho^2, the part of the variance of this round's class means that the remembered ones explain:
1 where all classes have moved alike, 0 where the two have nothing in common, and in between less the older they are.

Sources: a server's memory of the clients that a round leaves out, Gu et al. 2021 (MIFA), arXiv 2106.04159, and
Jhunjhunwala et al. 2022 (FedVARP), arXiv 2207.14130; compensation of the drift of class means, Yu et al. 2020 (SDC), arXiv
2004.00440. On 10 of 50 clients no discount, an assumed discount by age, and a random walk fitted to the same correlations
were at most as good, in accuracy and in loss (docs/records/decisions.md).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.tensors.state import State

_FEWEST_CLASSES = 2


class HeadSums(NamedTuple):
    """Sums that determine a head with a bias.

    Attributes:
        gram: Gram matrix of the head's inputs; the last input is a one, or a factor that is the same for every row.
        sums: sum of the inputs of each class.
    """

    gram: Float[Tensor, "inputs inputs"]
    sums: Float[Tensor, "classes inputs"]

    @property
    def nbytes(self) -> int:
        return self.gram.nbytes + self.sums.nbytes


class RememberedSums(NamedTuple):
    """The sums of one client, and the number of the round in which it sent them."""

    round: int
    sums: HeadSums


@dataclass(eq=False)
class HeadMemory:
    """The newest sums of each client, which change in place. The oldest are forgotten where there are too many.

    Laws: a client has one entry, which counts only in sums that do not hold the client; sums of all clients are returned
    as they are.

    Attributes:
        most_bytes: bytes of all sums; 0 remembers nothing.
        clients: the sums by node id.
        newest: the sums of the last head, without and with remembered ones; None where there were none to add.
    """

    most_bytes: int = 0
    clients: dict[int, RememberedSums] = field(default_factory=dict)
    newest: tuple[HeadSums, HeadSums] | None = None

    def add(self, number: int, node: int, sums: HeadSums) -> None:
        """Remember a copy of one client's sums, in place of its older ones.

        Args:
            number: number of the round.
            node: node id of the client.
            sums: its sums.
        """
        if sums.nbytes <= self.most_bytes:
            self._remember({node: RememberedSums(number, HeadSums(sums.gram.clone(), sums.sums.clone()))})

    def merge(self, newer: "HeadMemory") -> None:
        """Take over all sums of another memory."""
        self._remember(newer.clients)

    def keep(self, nodes: Collection[int]) -> None:
        """Forget all clients but these."""
        self.clients = {node: entry for node, entry in self.clients.items() if node in nodes}

    def complete(self, fresh: HeadSums, nodes: Collection[int]) -> HeadSums:
        """Return a round's sums with the remembered ones of the clients that are not in it.

        Args:
            fresh: the sums of the round.
            nodes: the clients whose sums these are.
        """
        absent = {node: entry for node, entry in self.clients.items() if node not in nodes}
        total = fresh
        for _, group in groupby(_from_oldest(absent), lambda node: absent[node].round):
            earlier = _total(absent[node].sums for node in group)
            if earlier.sums.shape == fresh.sums.shape:
                total = _total((total, _carry_over(earlier, fresh)))
        self.newest = None if total is fresh else (fresh, total)
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums as named tensors, for a checkpoint."""
        return {
            f"{node}/{entry.round}/{name}": tensor
            for node, entry in self.clients.items()
            for name, tensor in entry.sums._asdict().items()
        }

    def restore(self, tensors: State) -> None:
        """Take the sums of a checkpoint, in place of all that is remembered."""
        keys = {tuple(map(int, name.split("/")[:2])) for name in tensors}
        self.clients = {
            node: RememberedSums(number, HeadSums(tensors[f"{node}/{number}/gram"], tensors[f"{node}/{number}/sums"]))
            for node, number in sorted(keys)
        }

    def _remember(self, newer: Mapping[int, RememberedSums]) -> None:
        self.clients |= newer
        excess = sum(entry.sums.nbytes for entry in self.clients.values()) - self.most_bytes
        for node in _from_oldest(self.clients):
            if excess <= 0:
                return
            excess -= self.clients.pop(node).sums.nbytes


def _from_oldest(clients: Mapping[int, RememberedSums]) -> list[int]:
    """Return nodes in the order of their rounds; the order of replies must not decide sums or what is forgotten."""
    return sorted(clients, key=lambda node: (clients[node].round, node))


def _total(parts: Iterable[HeadSums]) -> HeadSums:
    grams, sums = zip(*parts, strict=True)
    return HeadSums(torch.stack([g.double() for g in grams]).sum(0), torch.stack([s.double() for s in sums]).sum(0))


def _carry_over(earlier: HeadSums, fresh: HeadSums) -> HeadSums:
    """Return the sums of earlier rounds, moved and discounted by what the class means of this round say."""
    now, before = fresh.sums.double(), earlier.sums
    common = (now[:, -1] > 0) & (before[:, -1] > 0)
    now, before = now[common], before[common]
    if len(now) < _FEWEST_CLASSES:
        return HeadSums(torch.zeros_like(earlier.gram), torch.zeros_like(earlier.sums))
    weights = (now[:, -1:] * before[:, -1:]) / (now[:, -1:] + before[:, -1:])
    weights = weights / weights.sum()
    means, were = now[:, :-1] / now[:, -1:], before[:, :-1] / before[:, -1:]
    mean, was = (weights * means).sum(0), (weights * were).sum(0)
    return _scale(_move(earlier, mean - was), _correlation(weights, means - mean, were - was))


def _correlation(weights: Tensor, now: Tensor, before: Tensor) -> float:
    """Return the part of the variance of centred class means that earlier ones explain."""
    covariance, *variances = ((weights * a * b).sum() for a, b in ((now, before), (now, now), (before, before)))
    largest = variances[0] * variances[1]
    return float(covariance.clamp(min=0).square() / largest) if largest > 0 else 0.0


def _move(sums: HeadSums, step: Float[Tensor, " features"]) -> HeadSums:
    """Return the sums of rows that a step has been added to, in units of the last input."""
    step = torch.cat([step, step.new_zeros(1)])
    ones = sums.gram[:, -1]
    crossed = torch.outer(ones, step)
    gram = sums.gram + crossed + crossed.mT + ones[-1] * torch.outer(step, step)
    return HeadSums(gram, sums.sums + sums.sums[:, -1:] * step)


def _scale(sums: HeadSums, factor: float) -> HeadSums:
    return HeadSums(sums.gram * factor, sums.sums * factor)
