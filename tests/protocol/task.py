"""A task: examples to train and to test on, the same for every seed."""

from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import one_hot

# Inputs are images `[example, channel, row, column]`, vectors `[example, feature]`, series `[example, time, feature]` or
# tokens `[example, place]`; targets are what the kind of task has.
Examples: TypeAlias = tuple[Shaped[Tensor, "example ..."], Shaped[Tensor, "example ..."]]


@dataclass(frozen=True, eq=False)
class Task:
    """Examples, and what a model makes of them.

    Attributes:
        train: inputs and targets that clients share out among themselves.
        test: inputs and targets that no client has.
        classes: how many outputs a model has for each place: classes, labels or numbers.
        tokens: how many different tokens the inputs have; 0 where inputs are numbers.
        groups: where each training example comes from, if the data has sources of its own, as fonts.
        kind: the mod's name of the task.
        strata: what clients differ in, for each training example; None for the targets, which are classes then.
    """

    train: Examples
    test: Examples
    classes: int
    tokens: int = 0
    groups: Int[Tensor, "example"] | None = None
    kind: str = "classification"
    strata: Int[Tensor, "example"] | None = None

    @property
    def labels(self) -> Int[Tensor, "example"]:
        """What clients differ in, for each training example."""
        return self.train[1] if self.strata is None else self.strata

    def goals(self, targets: Tensor) -> Float[Tensor, "example output"]:
        """The numbers that a linear head is fitted to."""
        if self.kind == "regression":
            return targets
        return 2 * targets - 1 if self.kind == "multi-label" else one_hot(targets, self.classes).float()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.train[0].shape[1:])

    def vectors(self, inputs: Tensor) -> Float[Tensor, "example feature"]:
        """Inputs as flat vectors, tokens one-hot: what a linear model reads."""
        return (one_hot(inputs, self.tokens).float() if self.tokens else inputs).flatten(1)
