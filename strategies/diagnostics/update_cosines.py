"""Update cosines: measure how the clients' updates of a round lie to one another, from a few entries of each.

    u_k = client - anchor        cos(u, v) = <u, v> / (||u|| ||v||)
    mean over k of cos(u_k, v)           = <s, v> / (K ||v||)              s = sum_k u_k / ||u_k||
    mean over pairs of cos(u_j, u_k)     = (||s||^2 - K) / (K (K - 1))

One sum of unit vectors is enough, whatever the number of clients. Entries are sampled and weighted by the number of
entries that each stands for: norms are estimates, and cosines have a standard error of about `1 / sqrt(entries)`. Models
with no more entries than the sample are read completely.
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedbasin.strategies.tensors.state import State, floating

ENTRIES = 2**10

# Number of neighbouring entries drawn together: fetching a place in memory costs more than reading on from it.
_RUN = 16

Vector = Float[Tensor, " entries"]


@dataclass(frozen=True, eq=False)
class Sample:
    """A choice of entries of a state.

    Attributes:
        names: names of all floating tensors.
        places: positions of the chosen entries in each tensor that has some.
        entries: number of chosen entries.
        of: number of all entries.
    """

    names: frozenset[str]
    places: dict[str, Int[Tensor, " some"]]
    entries: int
    of: int

    @classmethod
    def draw(cls, state: State, entries: int = ENTRIES, seed: int = 0) -> "Sample":
        """Choose entries in short runs from anywhere; equal for all states of the same shapes and one seed."""
        sizes = {name: tensor.numel() for name, tensor in floating(state).items()}
        of = sum(sizes.values())
        chosen = _choose_entries(of, entries, seed)
        ends = torch.tensor(list(accumulate(sizes.values(), initial=0)))
        cuts = torch.searchsorted(chosen, ends).tolist()
        runs = zip(sizes, ends.tolist(), pairwise(cuts), strict=False)
        places = {name: chosen[a:b] - start for name, start, (a, b) in runs if b > a}
        return cls(frozenset(sizes), places, len(chosen), of)

    def fits(self, state: State) -> bool:
        """Return True if the state has all of the tensors."""
        return self.names <= state.keys()

    def gather(self, state: State) -> Vector:
        """Read the entries in float64 on the CPU, each scaled so that the norm estimates that of all entries."""
        if not self.places:
            return torch.zeros(0, dtype=torch.float64)
        parts = [torch.take(state[n], some.to(state[n].device)) for n, some in self.places.items()]
        return torch.cat(parts).cpu().double().mul_(math.sqrt(self.of / self.entries))


def _choose_entries(of: int, entries: int, seed: int) -> Int[Tensor, " chosen"]:
    if entries >= of or of <= _RUN:
        return torch.arange(of)
    # The diagnostics' seed is fixed: a round's movement is compared with the next round's updates, entry by entry.
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(of - _RUN, (entries // _RUN,), generator=generator).sort().values
    return (starts[:, None] + torch.arange(_RUN)).flatten().sort().values


@dataclass(frozen=True)
class ClientUpdate:
    """The size and direction of one client's update.

    Attributes:
        norm: Euclidean norm.
        cosine: cosine with the global model's movement in the previous round; None where one of the two is zero or there
            was no such round.
    """

    norm: float
    cosine: float | None


@dataclass(frozen=True)
class MeanCosines:
    """Means over all clients' updates; cosines are None where too few updates differ from zero.

    Attributes:
        clients: number of clients.
        norm: mean Euclidean norm.
        fused: mean cosine with the new global model's movement.
        previous: mean cosine with the global model's movement in the previous round.
        pairs: mean cosine of two clients, over all pairs.
    """

    clients: int
    norm: float
    fused: float | None
    previous: float | None
    pairs: float | None


class UpdateCosineAccumulator:
    """A running sum over a round's clients, changed in place by `add`."""

    def __init__(self, anchor: State, previous: Vector | None = None) -> None:
        """Begin with no clients.

        Args:
            anchor: the model that the clients were sent.
            previous: the previous round's `movement` of the global model.
        """
        self.sample = Sample.draw(anchor)
        self.clients = 0
        self._anchor = self.sample.gather(anchor)
        self._previous = previous
        self._norms = 0.0
        self._units = torch.zeros_like(self._anchor)
        self._nonzero = 0

    def add(self, client: State) -> ClientUpdate | None:
        """Add one client's update; a client without all of the anchor's tensors gives None and adds nothing."""
        if not self.sample.fits(client):
            return None
        update = self.sample.gather(client) - self._anchor
        # Entries that are infinite in both, as in a mask, do not move.
        update[~self._anchor.isfinite()] = 0
        norm = float(torch.linalg.vector_norm(update))
        self.clients += 1
        self._norms += norm
        # An update of zero has no direction: it counts in the mean norm and in no cosine.
        if norm:
            self._nonzero += 1
            self._units += update / norm
        return ClientUpdate(norm, _cosine(update, self._previous))

    def movement(self, model: State) -> Vector:
        """Return the difference of a new global model and the anchor, at the sample's entries."""
        return self.sample.gather(model) - self._anchor

    def finish(self, movement: Vector) -> MeanCosines:
        """Compute the mean cosines of the clients' updates, with `movement` as the new global model's."""
        if not self.clients:
            return MeanCosines(0, 0.0, None, None, None)
        return MeanCosines(
            clients=self.clients,
            norm=self._norms / self.clients,
            fused=self._mean_cosine(movement),
            previous=self._mean_cosine(self._previous),
            pairs=self._mean_of_pairs(),
        )

    def _mean_cosine(self, vector: Vector | None) -> float | None:
        length = 0.0 if vector is None else float(torch.linalg.vector_norm(vector))
        if vector is None or not (length and self._nonzero):
            return None
        return float(self._units @ vector) / (self._nonzero * length)

    def _mean_of_pairs(self) -> float | None:
        count = self._nonzero
        if count < 2:
            return None
        return (float(self._units @ self._units) - count) / (count * (count - 1))


def _cosine(a: Vector, b: Vector | None) -> float | None:
    if b is None:
        return None
    scale = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return float(a @ b) / scale if scale else None
