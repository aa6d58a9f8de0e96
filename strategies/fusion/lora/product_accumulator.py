"""The accumulator of low-rank adapters: sums of the products of their factors.

    P = sum_k n_k B_k A_k / sum_k n_k                         Bai et al. 2024 (FlexLoRA), arXiv 2402.11505
    P = (sum_k B_k A_k G_k + rho P_0) (sum_k G_k + rho I)^-1  with Gram matrices G_k of the inputs; P_0 is the mean

A mean of factors is not a mean of products, because B and A are unique only up to `B M^-1`, `M A`. The product is fused
as the weight of any layer, and then split again at the rank of the global model: as the closest product in the norm of
`sum_k G_k`, in which P is the closest to the clients', or in Frobenius norm without Gram matrices. All other tensors of
the state are averaged by an `Accumulator`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge
from fedbasin.strategies.fusion.lora.lora_factors import Adapter, find_adapters
from fedbasin.strategies.fusion.lora.lowrank import LowRank
from fedbasin.strategies.fusion.precisions import Precision, common, sum_precisions
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.tensors.state import State

# Width of a compressed sum, in multiples of the adapter's rank. Sums are compressed beyond twice this width, so the
# first eight clients' products are exact.
_WIDTH = 4


@dataclass(eq=False)
class ProductAccumulator:
    """Sums over the clients of a round, which change in place, with the interface of `Accumulator`.

    Laws: `merge` is associative and commutative, with `zero` neutral, up to rounding and to `dropped`, which is zero
    for up to eight clients and for layers no larger than four times the rank; clients with the same product give that
    product, however each of them factorises it. Memory is that of eight clients' factors.

    Attributes:
        rest: accumulator of the tensors that are not factors.
        widths: width to which each sum is compressed.
        products: `sum_k n_k B_k A_k`.
        cross_moments: `sum_k B_k A_k G_k` of adapters with Gram matrices.
        blocks: sum of the Gram matrices of each block, and the left factor of its cross-moment.
    """

    rest: Accumulator
    widths: dict[Adapter, int]
    products: dict[Adapter, LowRank]
    cross_moments: dict[Adapter, LowRank] = field(default_factory=dict)
    blocks: dict[Block, tuple[Precision, Tensor]] = field(default_factory=dict)
    notes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def zero(cls, anchor: State, dtype: torch.dtype = torch.float64) -> "ProductAccumulator":
        """Return an accumulator without clients for the anchor's tensors.

        Raises:
            AdapterError: the anchor has no adapters, or adapters of a convolution.
        """
        adapters = find_adapters(anchor)
        factors = {name for adapter in adapters for name in (adapter.down, adapter.up)}
        rest = {name: tensor for name, tensor in anchor.items() if name not in factors}
        zeros = {a: LowRank.zero(len(anchor[a.up]), anchor[a.down].shape[1]) for a in adapters}
        widths = {adapter: _WIDTH * len(anchor[adapter.down]) for adapter in adapters}
        return cls(Accumulator.zero(rest, dtype), widths, zeros)

    @property
    def clients(self) -> int:
        """The number of updates."""
        return self.rest.clients

    @property
    def dropped(self) -> float:
        """The largest bound on the Frobenius norm of the error of a layer's mean product."""
        error = max(product.dropped for product in self.products.values())
        return error / self.rest.examples if error else 0.0

    def add(self, update: Update) -> None:
        """Add one client's update in place, without keeping a reference to it."""
        for adapter, total in self.products.items():
            product = adapter.product(update.parameters).scaled(update.examples)
            self.products[adapter] = total.plus(product, self.widths[adapter])
        precisions = {
            adapter: update.precisions[adapter.down,]
            for adapter in self.products
            if (adapter.down,) in update.precisions
        }
        self._add(precisions, partial(_cross_moment, update))
        self.rest.add(replace(update, precisions={}, cross_moments={}))

    def merge(self, other: "ProductAccumulator") -> None:
        """Add the clients of another accumulator in place."""
        for adapter, product in other.products.items():
            total = self.products[adapter]
            self.products[adapter] = total.plus(product, self.widths[adapter])
        precisions = {adapter: other.blocks[adapter.down,][0] for adapter in other.cross_moments}
        self._add(precisions, other.cross_moments.__getitem__)
        self.rest.merge(other.rest)

    def finalize(self, anchor: State, ridge: Ridge | None = None) -> dict[str, Tensor]:
        """Return the fused model in the anchor's dtypes, with factors rotated to the anchor's."""
        fused = self.rest.finalize(anchor)
        if not self.clients:
            return fused
        for adapters in common({adapter: self._total(adapter) for adapter in self.products}):
            for adapter, solution in zip(adapters, self._solve(adapters, ridge), strict=True):
                old = adapter.product(anchor)
                new = solution.balance(old.width).align_to(old)
                fused[adapter.up] = new.left.to(anchor[adapter.up].dtype)
                fused[adapter.down] = new.right.to(anchor[adapter.down].dtype)
        return fused

    def average(self, anchor: State) -> dict[str, Tensor]:
        """Return the model with the mean of the products by examples; see `finalize`."""
        return self.finalize(anchor)

    def _add(self, precisions: Mapping[Adapter, Precision], cross_moment: Callable[[Adapter], LowRank]) -> None:
        for adapters, total in sum_precisions(self._total, precisions):
            for adapter in adapters:
                moment = cross_moment(adapter)
                if adapter in self.cross_moments:
                    moment = self.cross_moments[adapter].plus(moment, self.widths[adapter])
                self.cross_moments[adapter] = moment
                self.blocks[adapter.down,] = total, moment.left

    def _total(self, adapter: Adapter) -> Precision | None:
        return self.blocks[adapter.down,][0] if adapter in self.cross_moments else None

    def _solve(self, adapters: Sequence[Adapter], ridge: Ridge | None) -> list[LowRank]:
        """Return the fused products of adapters that share one Gram matrix, or that have none, in the anchor's rank."""
        means = [self.products[adapter].scaled(1 / self.rest.examples) for adapter in adapters]
        precision = self._total(adapters[0])
        if precision is None or ridge is None:
            return means
        prior = precision.isotropic(ridge.strength)
        # No example has reached the layer.
        if not prior.weight:
            return means
        totals = [
            # Wide enough that nothing is compressed before the solution.
            moment.plus(mean.scaled(prior.weight), moment.width + mean.width)
            for moment, mean in zip(map(self.cross_moments.__getitem__, adapters), means, strict=True)
        ]
        posterior = precision + prior
        rights = posterior.solve(torch.cat([total.right for total in totals])).split([t.width for t in totals])
        return [
            LowRank(total.left, right).closest_on(self.widths[adapter] // _WIDTH, posterior.weigh)
            for adapter, total, right in zip(adapters, totals, rights, strict=True)
        ]


def _cross_moment(update: Update, adapter: Adapter) -> LowRank:
    product = adapter.product(update.parameters)
    return LowRank(product.left, update.precisions[adapter.down,].weigh(product.right))
