"""The running sum of adapted clients: products of factors, not factors.

    P = sum_k n_k B_k A_k / sum_k n_k                         Bai et al. 2024 (FlexLoRA), arXiv 2402.11505
    P = (sum_k B_k A_k G_k + rho P_0) (sum_k G_k + rho I)^-1  where inputs' Gram matrices G_k are known; P_0 the mean

The mean of factors is no mean of products: B and A are known up to `B M^-1`, `M A`. The product is a weight like any
other, and fused like one; then it is split again, at the rank of the global model. Everything else in the state is
averaged, as `Tally` does.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedbasin.strategies.fusion.adapters import Adapter, find_adapters
from fedbasin.strategies.fusion.lowrank import LowRank
from fedbasin.strategies.fusion.precision import Precision
from fedbasin.strategies.fusion.tally import Ridge, Tally
from fedbasin.strategies.fusion.update import Block, Update
from fedbasin.strategies.state import State

# Ranks of the sum, in multiples of the adapter's own.
_WIDTH = 4


@dataclass(eq=False)
class ProductTally:
    """The sums over the clients so far; as `Tally`, and mutable as that one.

    Laws: `fold` is commutative up to rounding and to `dropped`, and exact for as many clients as `2 * 4` or where the
    layer is no larger than four times the rank; clients with the same product give that product; gauges of the
    clients do not matter. Memory is that of `8` clients' factors and does not grow.

    Attributes:
        rest: the tensors that are no factors.
        products: `sum_k n_k B_k A_k`.
        moments: `sum_k B_k A_k G_k`, where there are Gram matrices.
        blocks: for each block of such a matrix its sum, and the left factor of the moment.
    """

    rest: Tally
    products: dict[Adapter, LowRank]
    moments: dict[Adapter, LowRank] = field(default_factory=dict)
    blocks: dict[Block, tuple[Precision, Tensor]] = field(default_factory=dict)

    @classmethod
    def zero(cls, anchor: State, dtype: torch.dtype = torch.float64) -> "ProductTally":
        """The empty sum.

        Raises:
            AdapterError: the anchor has no adapters, or some of a convolution.
        """
        adapters = find_adapters(anchor)
        factors = {name for adapter in adapters for name in (adapter.down, adapter.up)}
        rest = {name: tensor for name, tensor in anchor.items() if name not in factors}
        nothing = {a: LowRank.zero(len(anchor[a.up]), anchor[a.down].shape[1]) for a in adapters}
        return cls(Tally.zero(rest, dtype), nothing)

    @property
    def clients(self) -> int:
        """Number of updates."""
        return self.rest.clients

    @property
    def dropped(self) -> float:
        """Bound on the Frobenius norm of what the mean product of any layer lacks."""
        weight = max(self.rest.examples, 1.0)
        return max(product.dropped for product in self.products.values()) / weight

    def fold(self, update: Update) -> None:
        """Add one client, in place; the update is not kept."""
        for adapter, total in self.products.items():
            product = adapter.product(update.parameters)
            width = _WIDTH * product.width
            self.products[adapter] = total.plus(product.scaled(update.examples), width)
            if (adapter.down,) in update.precisions:
                self._weigh(adapter, product, update.precisions[adapter.down,], width)
        self.rest.fold(replace(update, precisions={}, moments={}))

    def finalize(self, anchor: State, ridge: Ridge | None = None) -> dict[str, Tensor]:
        """The fused model, in the anchor's dtypes; factors lie as the anchor's do."""
        fused = self.rest.finalize(anchor)
        if not self.clients:
            return fused
        for adapter in self.products:
            before = adapter.product(anchor)
            after = self._solution(adapter, ridge).balanced(before.width).facing(before)
            fused[adapter.up] = after.left.to(anchor[adapter.up].dtype)
            fused[adapter.down] = after.right.to(anchor[adapter.down].dtype)
        return fused

    def _weigh(self, adapter: Adapter, product: LowRank, known: Precision, width: int) -> None:
        moment = LowRank(product.left, known.weigh(product.right))
        if adapter in self.moments:
            before, _ = self.blocks[adapter.down,]
            known = before + known
            moment = self.moments[adapter].plus(moment, width)
        else:
            known = known.scaled(1.0)
        self.moments[adapter] = moment
        self.blocks[adapter.down,] = known, moment.left

    def _solution(self, adapter: Adapter, ridge: Ridge | None) -> LowRank:
        mean = self.products[adapter].scaled(1 / self.rest.examples)
        if adapter not in self.moments or ridge is None:
            return mean
        precision, _ = self.blocks[adapter.down,]
        prior = precision.isotropic(ridge.strength)
        if not prior.weight:
            return mean
        moment = self.moments[adapter]
        total = moment.plus(mean.scaled(prior.weight), moment.width + mean.width)
        return LowRank(total.left, (precision + prior).solve(total.right))
