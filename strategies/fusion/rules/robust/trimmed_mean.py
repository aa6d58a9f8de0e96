"""The mean of each coordinate without its largest and smallest values (Yin et al. 2018, arXiv 1803.01498)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


def trimmed_mean(anchor: Tensor, tensors: Tensor, weights: Tensor, *, hostile: int) -> Tensor:
    """Return the mean of each entry after leaving out the `hostile` largest and the `hostile` smallest.

    Args:
        anchor: the tensor of the global model, which is not read.
        tensors: the clients' tensors, along the first axis.
        weights: of the clients, which are not read: a claimed number of examples would break the bound.
        hostile: number of values that are left out at either end.
    """
    del anchor, weights
    ordered = tensors.sort(0).values
    return ordered[hostile : len(tensors) - hostile].mean(0)


@dataclass(frozen=True)
class TrimmedMean:
    """The trimmed mean of each coordinate.

    Attributes:
        hostile: number of hostile clients that it withstands.
    """

    hostile: int
    name: ClassVar[str] = "trimmed-mean"

    @property
    def least(self) -> int:
        """The smallest number of clients of which some values are left."""
        return 2 * self.hostile + 1

    def __call__(self, anchor: Tensor, tensors: Tensor, weights: Tensor) -> Tensor:
        return trimmed_mean(anchor, tensors, weights, hostile=self.hostile)

    def trimmed(self, clients: int) -> int:  # noqa: ARG002 - the same of any number
        """Return the number of values that are left out at either end."""
        return self.hostile
