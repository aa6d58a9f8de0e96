"""Means of integer and boolean tensors, which have no gradient and still belong to the model: counters, zero points, masks.

    sum_k n_k x_k / sum_k n_k, rounded to the nearest integer; of a mask, what most examples say

Equal tensors give that tensor, to the last bit: a hash of 64 bits is no double.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tally:
    """A sum over clients of one tensor.

    Attributes:
        first: the tensor of the first client.
        total: `sum_k n_k x_k`.
        examples: `sum_k n_k` over the clients that sent the tensor.
        alike: whether all of them sent the same tensor.
    """

    first: Tensor
    total: Tensor
    examples: float
    alike: bool = True

    @classmethod
    def of(cls, tensor: Tensor, examples: float) -> "Tally":
        """Return the sum over one client."""
        return cls(tensor.clone(), tensor.double() * examples, examples)

    def __add__(self, other: "Tally") -> "Tally":
        """Return the sum over the clients of both."""
        alike = self.alike and other.alike and torch.equal(self.first, other.first)
        return Tally(self.first, self.total + other.total, self.examples + other.examples, alike)

    @property
    def mean(self) -> Tensor:
        """The mean, in the tensors' dtype."""
        dtype = self.first.dtype
        if self.alike:
            return self.first
        mean = self.total / self.examples
        return mean > 0.5 if dtype == torch.bool else mean.round().to(dtype)
