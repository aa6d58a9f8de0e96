"""The running sum of adapted clients: products of factors, not factors.

    P = sum_k n_k B_k A_k / sum_k n_k                         Bai et al. 2024 (FlexLoRA), arXiv 2402.11505
    P = (sum_k B_k A_k G_k + rho P_0) (sum_k G_k + rho I)^-1  where inputs' Gram matrices G_k are known; P_0 the mean

The mean of factors is no mean of products: B and A are known up to `B M^-1`, `M A`. The product is a weight like any
other, and fused like one; then it is split again, at the rank of the global model. Everything else in the state is
averaged, as `Accumulator` does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge
from fedbasin.strategies.fusion.lora.lora_factors import Adapter, find_adapters
from fedbasin.strategies.fusion.lora.lowrank import LowRank
from fedbasin.strategies.fusion.precisions import Precision, added, common
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.tensors.state import State

# Ranks of the sum, in multiples of the adapter's own.
_WIDTH = 4


@dataclass(eq=False)
class ProductAccumulator:
    """The sums over the clients so far; as `Accumulator`, and mutable as that one.

    Laws: `merge` is associative and commutative, with `zero` neutral, up to rounding and to `dropped`, which is nothing
    for up to eight clients and for layers no larger than four times the rank; clients with the same product give that
    product; the clients' gauges do not matter. Memory is that of eight clients' factors.

    Attributes:
        rest: the tensors that are no factors.
        widths: of the sums, by adapter.
        products: `sum_k n_k B_k A_k`.
        moments: `sum_k B_k A_k G_k`, where there are Gram matrices.
        blocks: for each block of such a matrix its sum, and the left factor of the moment.
    """

    rest: Accumulator
    widths: dict[Adapter, int]
    products: dict[Adapter, LowRank]
    moments: dict[Adapter, LowRank] = field(default_factory=dict)
    blocks: dict[Block, tuple[Precision, Tensor]] = field(default_factory=dict)

    @classmethod
    def zero(cls, anchor: State, dtype: torch.dtype = torch.float64) -> "ProductAccumulator":
        """The empty sum.

        Raises:
            AdapterError: the anchor has no adapters, or some of a convolution.
        """
        adapters = find_adapters(anchor)
        factors = {name for adapter in adapters for name in (adapter.down, adapter.up)}
        rest = {name: tensor for name, tensor in anchor.items() if name not in factors}
        nothing = {a: LowRank.zero(len(anchor[a.up]), anchor[a.down].shape[1]) for a in adapters}
        widths = {adapter: _WIDTH * len(anchor[adapter.down]) for adapter in adapters}
        return cls(Accumulator.zero(rest, dtype), widths, nothing)

    @property
    def clients(self) -> int:
        """Number of updates."""
        return self.rest.clients

    @property
    def dropped(self) -> float:
        """Bound on the Frobenius norm of what the mean product of any layer lacks."""
        lost = max(product.dropped for product in self.products.values())
        return lost / self.rest.examples if lost else 0.0

    def add(self, update: Update) -> None:
        """Add one client, in place; the update is not kept."""
        for adapter, total in self.products.items():
            product = adapter.product(update.parameters).scaled(update.examples)
            self.products[adapter] = total.plus(product, self.widths[adapter])
        sent = {adapter: update.precisions.get((adapter.down,)) for adapter in self.products}
        known = {adapter: gram for adapter, gram in sent.items() if gram is not None}
        self._add(known, partial(_moment, update))
        self.rest.add(replace(update, precisions={}, moments={}))

    def merge(self, other: "ProductAccumulator") -> None:
        """Add another accumulator's clients, in place."""
        for adapter, product in other.products.items():
            total = self.products[adapter]
            self.products[adapter] = total.plus(product, self.widths[adapter])
        known = {adapter: other.blocks[adapter.down,][0] for adapter in other.moments}
        self._add(known, other.moments.__getitem__)
        self.rest.merge(other.rest)

    def finalize(self, anchor: State, ridge: Ridge | None = None) -> dict[str, Tensor]:
        """The fused model, in the anchor's dtypes; factors lie as the anchor's do."""
        fused = self.rest.finalize(anchor)
        if not self.clients:
            return fused
        for adapters in common({adapter: self._known(adapter) for adapter in self.products}):
            for adapter, solution in zip(adapters, self._solutions(adapters, ridge), strict=True):
                before = adapter.product(anchor)
                after = solution.balanced(before.width).facing(before)
                fused[adapter.up] = after.left.to(anchor[adapter.up].dtype)
                fused[adapter.down] = after.right.to(anchor[adapter.down].dtype)
        return fused

    def _add(
        self, known: Mapping[Adapter, Precision], moment: Callable[[Adapter], LowRank]
    ) -> None:
        for adapters, total in added(self._known, known):
            for adapter in adapters:
                before, coming = self.moments.get(adapter), moment(adapter)
                own = coming if before is None else before.plus(coming, self.widths[adapter])
                self.moments[adapter] = own
                self.blocks[adapter.down,] = total, own.left

    def _known(self, adapter: Adapter) -> Precision | None:
        return self.blocks[adapter.down,][0] if adapter in self.moments else None

    def _solutions(self, adapters: Sequence[Adapter], ridge: Ridge | None) -> list[LowRank]:
        """Of adapters that have one Gram matrix in common, or none at all."""
        means = [self.products[adapter].scaled(1 / self.rest.examples) for adapter in adapters]
        precision = self._known(adapters[0])
        if precision is None or ridge is None:
            return means
        prior = precision.isotropic(ridge.strength)
        if not prior.weight:
            return means
        totals = [
            moment.plus(mean.scaled(prior.weight), moment.width + mean.width)
            for moment, mean in zip(map(self.moments.__getitem__, adapters), means, strict=True)
        ]
        solved = (precision + prior).solve(torch.cat([total.right for total in totals]))
        rights = solved.split([total.width for total in totals])
        return [LowRank(t.left, right) for t, right in zip(totals, rights, strict=True)]


def _moment(update: Update, adapter: Adapter) -> LowRank:
    product = adapter.product(update.parameters)
    return LowRank(product.left, update.precisions[adapter.down,].weigh(product.right))
