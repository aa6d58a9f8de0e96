"""A task: examples to train and to test on, the same for every seed."""

from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import one_hot

# Inputs are images `[example, channel, row, column]`, vectors `[example, feature]` or tokens `[example, place]`.
Examples: TypeAlias = tuple[Shaped[Tensor, "example ..."], Int[Tensor, "example"]]


@dataclass(frozen=True, eq=False)
class Task:
    """Classification.

    Attributes:
        train: inputs and labels that clients share out among themselves.
        test: inputs and labels that no client has.
        classes: how many labels there are.
        tokens: how many different tokens the inputs have; 0 where inputs are numbers.
        groups: where each training example comes from, if the data has sources of its own, as fonts.
    """

    train: Examples
    test: Examples
    classes: int
    tokens: int = 0
    groups: Int[Tensor, "example"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.train[0].shape[1:])

    def vectors(self, inputs: Tensor) -> Float[Tensor, "example feature"]:
        """Inputs as flat vectors, tokens one-hot: what a linear model reads."""
        return (one_hot(inputs, self.tokens).float() if self.tokens else inputs).flatten(1)
