"""What clients minimise and what counts as right, for each kind of task, in PyTorch's own functions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

Pair: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kind:
    """How outputs and targets of a kind of task are compared.

    Attributes:
        loss: mean loss of outputs and targets.
        right: which of them are right; None where there is no right and wrong.
        pairs: outputs and the targets that they are compared with.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    right: Callable[[Tensor, Tensor], Tensor] | None = None
    pairs: Callable[[Tensor, Tensor], Pair] = lambda outputs, targets: (outputs, targets)


def _next_token(outputs: Tensor, targets: Tensor) -> Pair:
    return outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten()


def _most_likely(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.argmax(1) == targets


# By the mod's names of tasks.
KINDS = {
    "classification": Kind(cross_entropy, _most_likely),
    "pixels": Kind(cross_entropy, _most_likely),
    "language-modelling": Kind(cross_entropy, _most_likely, _next_token),
    "multi-label": Kind(binary_cross_entropy_with_logits, lambda outputs, targets: (outputs > 0) == (targets > 0)),
    "regression": Kind(mse_loss),
}


def loss_of(kind: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss over all places."""
    return KINDS[kind].loss(*KINDS[kind].pairs(outputs, targets))


def score(kind: str, outputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Accuracy and mean loss; the accuracy is NaN where there is no right and wrong."""
    pair = KINDS[kind].pairs(outputs, targets)
    right = KINDS[kind].right
    accuracy = math.nan if right is None else right(*pair).to(torch.float64).mean().item()
    return accuracy, KINDS[kind].loss(*pair).item()
