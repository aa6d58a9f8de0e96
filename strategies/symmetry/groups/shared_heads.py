"""Attention heads that share a key and a value head (grouped queries, Ainslie et al. 2023, arXiv 2305.13245)."""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.symmetry.groups.assignment import assign_all
from fedbasin.strategies.symmetry.groups.block_groups import (
    Inner,
    Roles,
    duals_of,
    inner_maximisers,
    inner_values,
    widths_of,
)

# Up to this many heads on one key all orders are tried, so that the maximum is global.
_ALL_ORDERS = 3


@dataclass(frozen=True)
class SharedHeads(Inner):
    """(A*B)xS(g): g heads that change places and all carry the element of the single head that they share.

    The roles are first those of `inners` (key, value) and then those of the heads that share them (query, output). On
    the latter an element is `P (x) T`: an order of the heads and the shared map.

    With more than three heads the order is found by alternating maximisation, from the identity and from the order that
    suits the best map of the single head alone. The result may then be a local maximum.

    Attributes:
        inners: groups of the shared head.
        heads: number of heads that share it.
    """

    inners: tuple[Inner, ...]
    heads: int

    def __str__(self) -> str:
        return f"({'*'.join(inner.as_factor for inner in self.inners)})xS({self.heads})"

    @property
    def widths(self) -> tuple[int, ...]:
        single = widths_of(self.inners)
        return (*single, *(self.heads * width for width in single))

    @property
    def duals(self) -> tuple[int, ...]:
        single = duals_of(self.inners)
        return (*single, *(len(single) + dual for dual in single))

    @property
    def permutes_blocks(self) -> bool:
        return True

    def values(self, scores: Roles) -> Float[Tensor, "*batch"]:
        return inner_values(self.inners, self._shared_scores(scores, self._orders(scores)))

    def maximisers(self, scores: Roles) -> Roles:
        orders = self._orders(scores)
        return self._dense(inner_maximisers(self.inners, self._shared_scores(scores, orders)), orders)

    def draw(self, count: int, generator: torch.Generator) -> Roles:
        orders = [torch.randperm(self.heads, generator=generator) for _ in range(count)]
        single = tuple(role for inner in self.inners for role in inner.draw(count, generator))
        return self._dense(single, torch.stack(orders))

    def _orders(self, scores: Roles) -> Tensor:
        """Return the best order of the heads, `[*batch, heads]`."""
        all_orders = self._all_orders if self.heads <= _ALL_ORDERS else self._local_maxima
        candidates = torch.stack(all_orders(scores))
        values = [inner_values(self.inners, self._shared_scores(scores, orders)) for orders in candidates]
        # argmax returns the first of equal values, and the identity comes first.
        best = torch.stack(values).argmax(0)
        return torch.take_along_dim(candidates, best[None, ..., None], 0)[0]

    def _all_orders(self, scores: Roles) -> list[Tensor]:
        batch = scores[0].shape[:-2]
        orders = itertools.permutations(range(self.heads))
        return [torch.tensor(order).expand(*batch, self.heads) for order in orders]

    def _local_maxima(self, scores: Roles) -> list[Tensor]:
        """Return orders that neither a new order under the same map nor a new map improves."""
        home = torch.arange(self.heads).expand(*scores[0].shape[:-2], self.heads)
        single = scores[: len(widths_of(self.inners))]
        # Two starts, because the identity is often a local maximum when the shared map is far from it.
        start = self._best_orders(scores, inner_maximisers(self.inners, single))
        return [self._climb(scores, orders) for orders in (home, start)]

    def _climb(self, scores: Roles, orders: Tensor) -> Tensor:
        # Every round raises the value or ends the loop; the bound only guards against rounding.
        for _ in range(self.heads * self.heads):
            maps = inner_maximisers(self.inners, self._shared_scores(scores, orders))
            improved = self._best_orders(scores, maps)
            if torch.equal(improved, orders):
                break
            orders = improved
        return orders

    def _best_orders(self, scores: Roles, maps: Roles) -> Tensor:
        """Return the best order of the heads under fixed shared maps."""
        pairs = zip(maps, self._by_head(scores), strict=True)
        gains = [torch.einsum("...ij,...acij->...ac", shared, score) for shared, score in pairs]
        return assign_all(torch.stack(gains).sum(0))

    def _by_head(self, scores: Roles) -> Roles:
        """Return the scores of the sharing roles as `[*batch, anchor head, client head, width, width]`."""
        single = widths_of(self.inners)
        shared = scores[len(single) :]
        return tuple(
            score.unflatten(-1, (self.heads, width)).unflatten(-3, (self.heads, width)).movedim(-2, -3)
            for score, width in zip(shared, single, strict=True)
        )

    def _shared_scores(self, scores: Roles, orders: Tensor) -> Roles:
        """Return the scores of the shared map: the single head's, plus those of all heads in the given order."""
        index = orders[..., :, None, None, None]
        return tuple(
            single + torch.take_along_dim(shared, index, -3).sum((-4, -3))
            for single, shared in zip(scores, self._by_head(scores), strict=False)
        )

    def _dense(self, single: Roles, orders: Tensor) -> Roles:
        permutations = torch.eye(self.heads, dtype=torch.float64)[orders]
        spread = tuple(
            torch.einsum("...ac,...ij->...aicj", permutations.to(role.dtype), role).flatten(-4, -3).flatten(-2, -1)
            for role in single
        )
        return (*single, *spread)
