"""The linear assignment problem: the order that maximises `sum_i score[i, order[i]]`, exactly.

Few entries of a large score can be in the best order: those that are large in their row or column. The
problem is solved on these alone, and prices prove that no other entry could help,

    score[i, j] - price[j]  <=  score[i, order[i]] - price[order[i]]      for all i, j

which makes the order optimal (Kuhn 1955). Where an entry breaks this, it is added and the rest is solved again:
column generation, as in LAPMOD (Volgenant 1996). Sparse problems go to SciPy's LAPJVsp (Jonker and Volgenant
1987), small ones to its dense shortest augmenting paths (Crouse 2016).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

Order = Int[Tensor, " n"]

# Below this width the dense solver is faster than the search for candidates.
_SMALL = 1024

# A row's candidates are its entries above the third largest of a sample of every 16th: about 48.
_STRIDE, _RANK = 16, 3

# Rows looked at together: they stay in the cache, and memory beside the score stays small.
_ROWS = 128

# Candidates in a row, on average, beyond which the dense solver is faster: rows of very different length.
_CROWDED = 128

# Prices are exact to this share of the largest score.
_ROUNDING = 1e-12


def assign(score: Float[Tensor, "n n"], bonus: float = 0.0) -> Order:
    """The order that maximises `sum_i score[i, order[i]]`.

    Args:
        score: on any device; only candidates leave it.
        bonus: added to the diagonal, so that ties go to the identity.
    """
    if len(score) < _SMALL:
        return _dense(score, bonus)
    edges = _diagonal(score, bonus).merged(*_candidates(score))
    prices = np.zeros(len(score))
    while edges.count <= _CROWDED * len(score):
        order = edges.matched(prices)
        prices = edges.raised(prices, order)
        missing = edges.merged(*_violations(score, order, prices, 2 * edges.rounding, bonus))
        if missing.count == edges.count:
            return torch.from_numpy(order)
        edges = missing
    return _dense(score, bonus)


def assign_all(scores: Float[Tensor, "*batch n n"]) -> Int[Tensor, "*batch n"]:
    """The order of each matrix of a batch."""
    size = scores.shape[-1]
    orders = [assign(score) for score in scores.reshape(-1, size, size)]
    return torch.stack(orders).reshape(scores.shape[:-1])


def _dense(score: Tensor, bonus: float) -> Order:
    # A minimum, because SciPy copies the matrix for a maximum.
    costs = score.detach().double().neg().cpu()
    costs.diagonal().sub_(bonus)
    columns = linear_sum_assignment(costs.numpy())[1]
    return torch.from_numpy(columns.astype(np.int64))


@dataclass(frozen=True, eq=False)
class _Edges:
    """Entries that may be in the order, row by row, without repetition; `key = row * n + column`."""

    size: int
    keys: NDArray[np.int64]
    weights: NDArray[np.float64]

    @property
    def count(self) -> int:
        return len(self.keys)

    def merged(self, keys: NDArray[np.int64], weights: NDArray[np.float64]) -> "_Edges":
        """With these entries too; of those that are there already, the old ones stay."""
        both = np.concatenate([self.keys, keys])
        unique, first = np.unique(both, return_index=True)
        return _Edges(self.size, unique, np.concatenate([self.weights, weights])[first])

    def matched(self, prices: NDArray[np.float64]) -> NDArray[np.int64]:
        """The best order of these entries alone; the diagonal is among them, so there is one.

        Prices leave it the same, as every column is taken once; good ones leave little to search.
        """
        # Costs from 1 up: an entry of zero would be taken for a missing one.
        rows, columns = np.divmod(self.keys, self.size)
        left = self.weights - prices[columns]
        costs = 1 + (left.max() - left) / self.scale
        graph = csr_array((costs, (rows, columns)), shape=(self.size, self.size))
        return min_weight_full_bipartite_matching(graph)[1].astype(np.int64)

    def raised(self, prices: NDArray[np.float64], order: NDArray[np.int64]) -> NDArray[np.float64]:
        """Prices from these on at which no row would change: longest paths (Bellman and Ford)."""
        rows, columns = np.divmod(self.keys, self.size)
        own = np.empty(self.size)
        taken = columns == order[rows]
        own[rows[taken]] = self.weights[taken]
        by_column = np.argsort(columns, kind="stable")
        starts = np.searchsorted(columns[by_column], np.arange(self.size))
        gains = (self.weights - own[rows])[by_column]
        leaving = order[rows][by_column]
        for _ in range(self.size):
            raised = np.maximum.reduceat(prices[leaving] + gains, starts)
            if (raised <= prices + self.rounding).all():
                break
            prices = np.maximum(raised, prices)
        return prices

    @cached_property
    def scale(self) -> float:
        return max(float(np.abs(self.weights).max()), np.finfo(np.float64).tiny)

    @property
    def rounding(self) -> float:
        """Differences up to this are none."""
        return _ROUNDING * self.scale


def _diagonal(score: Tensor, bonus: float) -> _Edges:
    keys = np.arange(len(score)) * (len(score) + 1)
    return _Edges(len(score), keys, score.diagonal().double().cpu().numpy() + bonus)


def _candidates(score: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    by_row = _threshold(score[:, ::_STRIDE])[:, None]
    by_column = _threshold(score[::_STRIDE].mT)
    return _picked(
        score, (rows > torch.minimum(by_row[at], by_column) for at, rows in _pieces(score))
    )


def _threshold(sample: Float[Tensor, "n some"]) -> Float[Tensor, " n"]:
    return sample.topk(_RANK, dim=1).values[:, -1]


def _violations(
    score: Tensor, order: NDArray[np.int64], prices: NDArray[np.float64], slack: float, bonus: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The entries that a row would rather have at these prices."""
    home = order == np.arange(len(order))
    own = score.gather(1, torch.from_numpy(order).to(score.device)[:, None]).squeeze(1)
    limits = own.double().cpu().numpy() + bonus * home - prices[order] + slack
    keys, weights = _picked(score, _above(score, limits, prices))
    rows, columns = np.divmod(keys, len(score))
    # Seen in the score's own precision: some are only rounding.
    sure = weights - prices[columns] > limits[rows]
    return keys[sure], weights[sure]


def _above(
    score: Tensor, limits: NDArray[np.float64], prices: NDArray[np.float64]
) -> Iterator[Tensor]:
    floor, costs = (torch.from_numpy(each).to(score) for each in (limits, prices))
    doubt = (
        4 * torch.finfo(score.dtype).eps * max(float(floor.abs().max()), float(costs.abs().max()))
    )
    return (rows - costs > (floor[at] - doubt)[:, None] for at, rows in _pieces(score))


def _picked(
    score: Tensor, masks: Iterator[Tensor]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Keys and values of the entries that the masks, one for each piece, let through."""
    found = []
    for (at, rows), mask in zip(_pieces(score), masks, strict=True):
        inside = mask.flatten().nonzero().squeeze(1)
        found.append((at.start * len(score) + inside, rows.flatten()[inside]))
    keys = torch.cat([key for key, _ in found]).cpu().numpy()
    values = torch.cat([value for _, value in found]).double().cpu().numpy()
    return keys, values


def _pieces(score: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(score), _ROWS):
        at = slice(start, min(start + _ROWS, len(score)))
        yield at, score[at]
