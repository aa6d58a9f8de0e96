"""Variance collapse: measure whether the fused model's hidden channels still vary as much as the clients' did.

    ratio_c = Var_c(fused) / (sum_k w_k sigma_c(client k))^2

The mean of two channels with correlation c keeps a fraction (1 + c) / 2 of the variance, so fusing without alignment
lets signals fade layer by layer. Source: REPAIR, Jordan et al. 2023, arXiv 2211.08403, whose target is the mean of the
standard deviations and not of the variances. Moments are sums over rows and so add up over clients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# A variance below this fraction of the mean square is a constant's rounding error.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class PreactivationMoments:
    """First and second moments of a layer's preactivations: sums over rows, in float64 and on the CPU.

    Law: a commutative monoid under addition with `PreactivationMoments.zero`.

    Attributes:
        rows: number of rows: examples, tokens or positions.
        total: sum of each channel.
        squares: sum of the squares of each channel.
    """

    rows: float
    total: Float[Tensor, " channels"]
    squares: Float[Tensor, " channels"]

    @classmethod
    def zero(cls, channels: int) -> "PreactivationMoments":
        """Return the moments of no rows."""
        nothing = torch.zeros(channels, dtype=torch.float64)
        return cls(0.0, nothing, nothing)

    @classmethod
    def of(cls, values: Float[Tensor, "rows channels"]) -> "PreactivationMoments":
        """Compute the moments of some rows."""
        wide = values.double()
        return cls(float(len(wide)), wide.sum(0).cpu(), wide.square().sum(0).cpu())

    def __add__(self, other: "PreactivationMoments") -> "PreactivationMoments":
        if self.total.shape != other.total.shape:
            raise ValueError(
                f"moments of {len(self.total)} and {len(other.total)} channels cannot be added; "
                "add moments of the same layer"
            )
        return PreactivationMoments(self.rows + other.rows, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Float[Tensor, " channels"]:
        """Mean of each channel.

        Raises:
            ValueError: there are no rows.
        """
        if not self.rows:
            raise ValueError("moments of no rows have no mean; collect them on some data first")
        return self.total / self.rows

    @property
    def variance(self) -> Float[Tensor, " channels"]:
        """Variance of each channel over the rows; zero for a channel that is constant up to rounding."""
        mean = self.mean
        square = self.squares / self.rows
        variance = square - mean.square()
        # The difference of two large squares may even be negative.
        return torch.where(variance > _ROUNDING * square, variance, 0.0)


@dataclass(frozen=True, eq=False)
class VarianceRatio:
    """The fraction of the clients' variance that a layer kept, from 0 for none to 1 for all.

    Attributes:
        channels: ratio of each channel; 1 where it varies in no model, infinite where it varies in the fused one only.
        layer: sum of the layer's variances divided by the sum of their targets, so that channels which hardly vary
            do not count as much as those that do.
    """

    channels: Float[Tensor, " channels"]
    layer: float


def variance_ratio(
    fused: PreactivationMoments, clients: Sequence[PreactivationMoments], weights: Sequence[float] | None = None
) -> VarianceRatio:
    """Compute the ratio of one layer.

    All moments should be over the same rows, because moments over each client's own data would also measure how the
    data differ. In a federation a client therefore compares both models on its own data.

    Args:
        fused: moments of the fused model.
        clients: moments of the aligned models that were fused.
        weights: weights of the fusion; None weighs all clients equally.

    Raises:
        ValueError: there are no clients, the weights do not fit them, or numbers of channels differ.
    """
    target = _mean_deviation(clients, weights).square()
    if target.shape != fused.total.shape:
        raise ValueError(
            f"{len(fused.total)} channels in the fused model and {len(target)} in the clients'; compare the same layer"
        )
    layer = _ratio(fused.variance.sum(), target.sum())
    return VarianceRatio(_ratio(fused.variance, target), float(layer))


def variance_ratios(
    fused: Mapping[str, PreactivationMoments],
    clients: Sequence[Mapping[str, PreactivationMoments]],
    weights: Sequence[float] | None = None,
) -> dict[str, VarianceRatio]:
    """Compute the ratio of every layer of the fused model, by name."""
    return {
        name: variance_ratio(moments, [client[name] for client in clients], weights) for name, moments in fused.items()
    }


def _mean_deviation(
    clients: Sequence[PreactivationMoments], weights: Sequence[float] | None
) -> Float[Tensor, " channels"]:
    shares = [1.0] * len(clients) if weights is None else list(weights)
    if len(shares) != len(clients) or not sum(shares) > 0 or min(shares) < 0:
        raise ValueError(f"weights {shares} for {len(clients)} clients; give each a weight, not all of them zero")
    deviations = torch.stack([moments.variance.sqrt() for moments in clients])
    return torch.tensor(shares, dtype=torch.float64) @ deviations / sum(shares)


def _ratio(variance: Tensor, target: Tensor) -> Tensor:
    return torch.where((variance == 0) & (target == 0), 1.0, variance / target)
