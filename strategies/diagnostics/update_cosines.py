"""How the clients' updates of a round lie to one another, from the same few entries of each.

    u_k = client - anchor        cos(u, v) = <u, v> / (||u|| ||v||)
    mean over k of cos(u_k, v)           = <s, v> / (K ||v||)              s = sum_k u_k / ||u_k||
    mean over pairs of cos(u_j, u_k)     = (||s||^2 - K) / (K (K - 1))

so one sum of unit vectors is all that is kept, however many clients there are. Entries are drawn from all that there
are and weighted by what they stand for: norms are estimates, and so are cosines, with a standard error of about
`1 / sqrt(entries)`. A model that has no more entries is looked at whole.
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedbasin.strategies.tensors.state import State, floating

ENTRIES = 2**10

# Neighbours that are drawn together: what costs is to fetch a place, not to read on from it.
_RUN = 16

Vector = Float[Tensor, " entries"]


@dataclass(frozen=True, eq=False)
class Sample:
    """Which entries of a state are looked at.

    Attributes:
        names: of all floating tensors.
        places: of each tensor in which there are some, positions in it.
        entries: how many are looked at.
        of: how many there are.
    """

    names: frozenset[str]
    places: dict[str, Int[Tensor, " some"]]
    entries: int
    of: int

    @classmethod
    def draw(cls, state: State, entries: int = ENTRIES) -> "Sample":
        """So many entries, in short runs from anywhere; the same ones for every state of the same shapes."""
        sizes = {name: tensor.numel() for name, tensor in floating(state).items()}
        of = sum(sizes.values())
        drawn = _drawn(of, entries)
        ends = torch.tensor(list(accumulate(sizes.values(), initial=0)))
        cuts = torch.searchsorted(drawn, ends).tolist()
        runs = zip(sizes, ends.tolist(), pairwise(cuts), strict=False)
        places = {name: drawn[a:b] - first for name, first, (a, b) in runs if b > a}
        return cls(frozenset(sizes), places, len(drawn), of)

    def fits(self, state: State) -> bool:
        """Whether the state has all of the tensors."""
        return self.names <= state.keys()

    def read(self, state: State) -> Vector:
        """The entries, each times the root of how many it stands for, in float64 on the CPU."""
        if not self.places:
            return torch.zeros(0, dtype=torch.float64)
        parts = [torch.take(state[n], some.to(state[n].device)) for n, some in self.places.items()]
        return torch.cat(parts).cpu().double().mul_(math.sqrt(self.of / self.entries))


def _drawn(of: int, wanted: int) -> Int[Tensor, " drawn"]:
    if wanted >= of or of <= _RUN:
        return torch.arange(of)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(of - _RUN, (wanted // _RUN,), generator=generator).sort().values
    return (starts[:, None] + torch.arange(_RUN)).flatten().sort().values


@dataclass(frozen=True)
class Direction:
    """One client's update.

    Attributes:
        norm: Euclidean.
        cosine: with what the round before moved the global model by; None where one of the two is zero or
            there was no such round.
    """

    norm: float
    cosine: float | None


@dataclass(frozen=True)
class Directions:
    """All clients' updates. Cosines are None where too few clients moved to have one.

    Attributes:
        clients: how many.
        norm: Euclidean, mean.
        fused: cosine with what the new global model moved by, mean.
        previous: cosine with what the round before moved by, mean.
        pairs: cosine of two clients, mean of all pairs.
    """

    clients: int
    norm: float
    fused: float | None
    previous: float | None
    pairs: float | None


class Drift:
    """The running sum over a round's clients; `add` changes it in place."""

    def __init__(self, anchor: State, previous: Vector | None = None) -> None:
        """An empty sum.

        Args:
            anchor: what the clients were sent.
            previous: what the round before moved the global model by, as its `movement` said.
        """
        self.sample = Sample.draw(anchor)
        self.clients = 0
        self._anchor = self.sample.read(anchor)
        self._previous = previous
        self._norms = 0.0
        self._units = torch.zeros_like(self._anchor)
        self._moved = 0

    def add(self, client: State) -> Direction | None:
        """One client's update; None, and nothing is added, where it does not have the anchor's tensors."""
        if not self.sample.fits(client):
            return None
        update = self.sample.read(client) - self._anchor
        norm = float(torch.linalg.vector_norm(update))
        self.clients += 1
        self._norms += norm
        if norm:
            self._moved += 1
            self._units += update / norm
        return Direction(norm, _cosine(update, self._previous))

    def movement(self, model: State) -> Vector:
        """What a new global model has moved by, at the sample's entries."""
        return self.sample.read(model) - self._anchor

    def finish(self, movement: Vector) -> Directions:
        """What the clients' updates have in common, and with the movement that they led to."""
        if not self.clients:
            return Directions(0, 0.0, None, None, None)
        return Directions(
            clients=self.clients,
            norm=self._norms / self.clients,
            fused=self._mean_cosine(movement),
            previous=self._mean_cosine(self._previous),
            pairs=self._mean_of_pairs(),
        )

    def _mean_cosine(self, other: Vector | None) -> float | None:
        length = 0.0 if other is None else float(torch.linalg.vector_norm(other))
        if other is None or not (length and self._moved):
            return None
        return float(self._units @ other) / (self._moved * length)

    def _mean_of_pairs(self) -> float | None:
        count = self._moved
        if count < 2:
            return None
        return (float(self._units @ self._units) - count) / (count * (count - 1))


def _cosine(a: Vector, b: Vector | None) -> float | None:
    if b is None:
        return None
    scale = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return float(a @ b) / scale if scale else None
