"""The median of each coordinate (Yin et al. 2018, arXiv 1803.01498)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


def median(anchor: Tensor, tensors: Tensor, weights: Tensor) -> Tensor:
    """Return the median of each entry; of an even number of clients, the mean of the middle two.

    Args:
        anchor: the tensor of the global model, which is not read.
        tensors: the clients' tensors, along the first axis.
        weights: of the clients, which are not read: a claimed number of examples would break the bound.
    """
    del anchor, weights
    ordered = tensors.sort(0).values
    low, high = ordered[(len(tensors) - 1) // 2], ordered[len(tensors) // 2]
    # Halved first: a sum of the largest numbers would overflow.
    return low / 2 + high / 2


@dataclass(frozen=True)
class Median:
    """The median of each coordinate: bounded while more than half of the clients are honest."""

    name: ClassVar[str] = "median"

    @property
    def least(self) -> int:
        """The smallest number of clients among which one can be outvoted."""
        return 3

    def __call__(self, anchor: Tensor, tensors: Tensor, weights: Tensor) -> Tensor:
        return median(anchor, tensors, weights)

    def trimmed(self, clients: int) -> int:
        """Return the number of values that are left out at either end."""
        return (clients - 1) // 2


def middle(tensors: Tensor) -> Tensor:
    """Return the lower median of each entry, which is an entry of some client: for integers and booleans."""
    return torch.sort(tensors, 0).values[(len(tensors) - 1) // 2]
