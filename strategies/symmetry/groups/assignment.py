"""An exact solver of the linear assignment problem: the order that maximises `sum_i score[i, order[i]]`.

Only entries that are large in their row or column can be part of the best order, so the problem is first solved on
these candidates. Prices then prove that no other entry could improve the solution,

    score[i, j] - price[j]  <=  score[i, order[i]] - price[order[i]]      for all i, j

which makes the order optimal (Kuhn 1955). Entries that violate the inequality are added to the candidates and the
problem is solved again: column generation, as in LAPMOD (Volgenant 1996). Sparse problems are solved by SciPy's
LAPJVsp (Jonker and Volgenant 1987), small ones by its dense shortest augmenting paths (Crouse 2016).
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

# The candidates of a row are its entries above the third largest of a sample of every 16th entry: about 48.
_STRIDE, _RANK = 16, 3

# Rows processed at a time: few enough to stay in the cache and to need little memory beside the score.
_ROWS = 128

# With more candidates per row, on average, the dense solver is faster: such rows have very different norms.
_CROWDED = 128

# Prices are exact up to this fraction of the largest score.
_ROUNDING = 1e-12


def assign(score: Float[Tensor, "n n"], bonus: float = 0.0) -> Order:
    """Return the order that maximises `sum_i score[i, order[i]]`.

    Args:
        score: square matrix on any device; only the candidate entries are copied to the CPU.
        bonus: number added to the diagonal, so that ties are decided for the identity.
    """
    if len(score) < _SMALL:
        return _dense(score, bonus)
    edges = _diagonal(score, bonus).add(*_candidates(score))
    prices = np.zeros(len(score))
    while edges.count <= _CROWDED * len(score):
        order = edges.best_order(prices)
        prices = edges.raise_prices(prices, order)
        extended = edges.add(*_violations(score, order, prices, 2 * edges.rounding, bonus))
        if extended.count == edges.count:
            return torch.from_numpy(order)
        edges = extended
    return _dense(score, bonus)


def assign_all(scores: Float[Tensor, "*batch n n"]) -> Int[Tensor, "*batch n"]:
    """Return the best order of each matrix of a batch."""
    size = scores.shape[-1]
    orders = [assign(score) for score in scores.reshape(-1, size, size)]
    return torch.stack(orders).reshape(scores.shape[:-1])


def _dense(score: Tensor, bonus: float) -> Order:
    # Negated scores are minimised, because SciPy copies the whole matrix to maximise.
    costs = score.detach().double().neg().cpu()
    costs.diagonal().sub_(bonus)
    columns = linear_sum_assignment(costs.numpy())[1]
    return torch.from_numpy(columns.astype(np.int64))


@dataclass(frozen=True, eq=False)
class _Edges:
    """The candidate entries of a score, row by row and without duplicates; `key = row * n + column`."""

    size: int
    keys: NDArray[np.int64]
    weights: NDArray[np.float64]

    @property
    def count(self) -> int:
        return len(self.keys)

    def add(self, keys: NDArray[np.int64], weights: NDArray[np.float64]) -> "_Edges":
        """Return the candidates with more entries; an entry that is present already keeps its weight."""
        unique, index = np.unique(np.concatenate([self.keys, keys]), return_index=True)
        return _Edges(self.size, unique, np.concatenate([self.weights, weights])[index])

    def best_order(self, prices: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the best order among the candidates, which exists because the diagonal is among them.

        Prices do not change the result, as every column is used once; good prices shorten the search.
        """
        # Costs start at 1, because a sparse matrix treats a zero entry as missing.
        rows, columns = np.divmod(self.keys, self.size)
        profits = self.weights - prices[columns]
        costs = 1 + (profits.max() - profits) / self.scale
        graph = csr_array((costs, (rows, columns)), shape=(self.size, self.size))
        return min_weight_full_bipartite_matching(graph)[1].astype(np.int64)

    def raise_prices(self, prices: NDArray[np.float64], order: NDArray[np.int64]) -> NDArray[np.float64]:
        """Raise prices until no row prefers another column: longest paths (Bellman 1958, Ford 1956)."""
        rows, columns = np.divmod(self.keys, self.size)
        matched_weights = np.empty(self.size)
        is_matched = columns == order[rows]
        matched_weights[rows[is_matched]] = self.weights[is_matched]
        by_column = np.argsort(columns, kind="stable")
        starts = np.searchsorted(columns[by_column], np.arange(self.size))
        gains = (self.weights - matched_weights[rows])[by_column]
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
        """The largest difference of two prices that counts as rounding."""
        return _ROUNDING * self.scale


def _diagonal(score: Tensor, bonus: float) -> _Edges:
    keys = np.arange(len(score)) * (len(score) + 1)
    return _Edges(len(score), keys, score.diagonal().double().cpu().numpy() + bonus)


def _candidates(score: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    by_row = _threshold(score[:, ::_STRIDE])[:, None]
    by_column = _threshold(score[::_STRIDE].mT)
    return _select(score, (rows > torch.minimum(by_row[at], by_column) for at, rows in _pieces(score)))


def _threshold(sample: Float[Tensor, "n some"]) -> Float[Tensor, " n"]:
    return sample.topk(_RANK, dim=1).values[:, -1]


def _violations(
    score: Tensor, order: NDArray[np.int64], prices: NDArray[np.float64], slack: float, bonus: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return keys and values of the entries that some row prefers at these prices."""
    home = order == np.arange(len(order))
    matched = score.gather(1, torch.from_numpy(order).to(score.device)[:, None]).squeeze(1)
    limits = matched.double().cpu().numpy() + bonus * home - prices[order] + slack
    keys, weights = _select(score, _above(score, limits, prices))
    rows, columns = np.divmod(keys, len(score))
    # The search ran in the precision of the score, so some violations are only rounding.
    confirmed = weights - prices[columns] > limits[rows]
    return keys[confirmed], weights[confirmed]


def _above(score: Tensor, limits: NDArray[np.float64], prices: NDArray[np.float64]) -> Iterator[Tensor]:
    floor, costs = (torch.from_numpy(values).to(score) for values in (limits, prices))
    doubt = 4 * torch.finfo(score.dtype).eps * max(float(floor.abs().max()), float(costs.abs().max()))
    return (rows - costs > (floor[at] - doubt)[:, None] for at, rows in _pieces(score))


def _select(score: Tensor, masks: Iterator[Tensor]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return keys and values of the entries that the masks select, one mask for each piece of rows."""
    selected = []
    for (at, rows), mask in zip(_pieces(score), masks, strict=True):
        inside = mask.flatten().nonzero().squeeze(1)
        selected.append((at.start * len(score) + inside, rows.flatten()[inside]))
    keys = torch.cat([key for key, _ in selected]).cpu().numpy()
    values = torch.cat([value for _, value in selected]).double().cpu().numpy()
    return keys, values


def _pieces(score: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(score), _ROWS):
        at = slice(start, min(start + _ROWS, len(score)))
        yield at, score[at]
