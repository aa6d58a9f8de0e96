"""Task vectors of a matrix, for rules that decompose them; other tensors get the sum of their task vectors."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedbasin.strategies.fusion.rules.span import combine
from fedbasin.strategies.tensors.pieces import working_dtype

Merge = Callable[[Float[Tensor, "models rows columns"]], Float[Tensor, "rows columns"]]


def merge_matrices(
    anchor: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], merge: Merge, scale: float
) -> Tensor:
    """Return `anchor + scale merge(w_k d_k)` of a matrix, and the scaled mean of the `w_k d_k` of another tensor.

    The papers average vectors. Kernels of convolutions are matrices of their outputs by all else.
    """
    if anchor.dim() < 2 or not anchor.numel():
        return combine(anchor, tensors, [scale * weight / len(tensors) for weight in weights])
    dtype = working_dtype(anchor)
    origin = anchor.to(dtype)
    pairs = zip(weights, tensors, strict=True)
    deltas = torch.stack([weight * (tensor.to(dtype) - origin).flatten(1) for weight, tensor in pairs])
    return (origin + scale * merge(deltas).reshape(anchor.shape)).to(anchor.dtype)
