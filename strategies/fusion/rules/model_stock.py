"""Model stock: the point between the anchor and the mean of the models that their angles call for.

    c = mean cosine of two task vectors,    r = K c / (1 + (K - 1) c),    t = r mean_k t_k + (1 - r) anchor

Jang, Yun, Han 2024, arXiv 2403.19522.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.fusion.rules.span import combine, inner_products
from fedbasin.strategies.tensors.pieces import map_rows

# Denominators and products of norms below this have no direction.
_TINY = 1e-12


def model_stock(anchor: Tensor, tensors: Sequence[Tensor], _weights: Sequence[float], *, filter_wise: bool) -> Tensor:
    """Return the interpolation of a whole tensor, or with `filter_wise` of each row by its own angles.

    Task vectors that cancel exactly have no finite ratio; there the anchor stays.
    """
    count = len(tensors)
    if not filter_wise:
        ratio = _ratio(inner_products(anchor, tensors)[None])
        return combine(anchor, tensors, [float(ratio) / count] * count)

    def kernel(block: Tensor) -> Tensor:
        deltas = (block[1:] - block[0]).transpose(0, 1)
        ratio = _ratio((deltas @ deltas.mT).double()).to(block)
        return block[0] + ratio[:, None] * deltas.mean(dim=1)

    return map_rows(kernel, (anchor, *tensors))


def _ratio(products: Float[Tensor, "rows tensors tensors"]) -> Float[Tensor, " rows"]:
    count = products.shape[1]
    norms = products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    sizes = (norms[:, :, None] * norms[:, None, :]).clamp(min=_TINY)
    above = torch.ones(count, count).triu(1).bool()
    cosine = (products / sizes).clamp(-1, 1)[:, above].mean(dim=1)
    denominator = 1 + (count - 1) * cosine
    return torch.where(denominator.abs() < 1e-6, 0.0, count * cosine / denominator)
