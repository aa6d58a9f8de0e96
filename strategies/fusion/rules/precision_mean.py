"""The mean of models weighted by what each knows of its weights, as a rule of tensors: what statistics do not cover.

    t = (sum_k w_k Lambda_k)^-1 sum_k w_k Lambda_k t_k        Lambda_k = 1 for tensors without a statistic

With Fisher information it is Fisher merging (Matena and Raffel 2022, arXiv 2111.09832), with Gram matrices RegMean (Jin
et al. 2023, arXiv 2212.09849) and RegMean++ (2025, arXiv 2508.03121). The sums are those of a round of the recipes of
these names, `fedbasin.strategies.fusion.accumulator`.
"""

from collections.abc import Sequence

from torch import Tensor

from fedbasin.strategies.fusion.rules.linear import linear


def precision_mean(
    anchor: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], **_statistics: float
) -> Tensor:
    """Return the mean of tensors that have no statistic."""
    return linear(anchor, tensors, weights, normalize=True)
