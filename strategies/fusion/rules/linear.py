"""The weighted mean of models.

    t = sum_k w_k t_k / sum_k w_k

With equal weights it is the uniform soup of fine-tuned models (Wortsman et al. 2022, arXiv 2203.05482), and over the
checkpoints of one run stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407).
"""

from collections.abc import Sequence

from torch import Tensor

from fedbasin.strategies.fusion.rules.span import combine, normalised


def linear(_anchor: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Return the mean of the tensors, or with `normalize` False their weighted sum."""
    return combine(None, tensors, normalised(weights) if normalize else weights)
