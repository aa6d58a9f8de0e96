"""What every client does in every round, under every rule: a few epochs of AdamW on its own examples."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.protocol.task import Examples

_TEST_BATCH = 1000


@dataclass(frozen=True)
class Training:
    """A client's settings.

    Attributes:
        epochs: passes over the client's examples in a round.
        batch: examples of a step.
        rate: AdamW's learning rate.
        decay: its weight decay.
    """

    epochs: int = 5
    batch: int = 32
    rate: float = 1e-3
    decay: float = 1e-2


def fit(model: nn.Module, examples: Examples, training: Training, seed: int, proximal: float = 0.0) -> float:
    """Train in place; returns the last batch's loss.

    Args:
        model: as the server sent it.
        examples: the client's own.
        training: how.
        seed: of the order of examples.
        proximal: FedProx's mu, the pull back to the model as it was sent.
    """
    inputs, labels = examples
    penalty = _pull(model, proximal)
    # A step of the fused kernel costs half of one that goes from parameter to parameter.
    optimiser = torch.optim.AdamW(model.parameters(), training.rate, weight_decay=training.decay, fused=True)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    loss = torch.tensor(0.0)
    for _ in range(training.epochs):
        for batch in torch.randperm(len(labels), generator=draw).split(training.batch):
            if len(batch) == 1 and _normalises(model):
                continue  # one example has no variance
            optimiser.zero_grad()
            loss = cross_entropy(model(inputs[batch]), labels[batch])
            (loss + penalty()).backward()
            optimiser.step()
    return loss.item()


@cache
def warm_up() -> None:
    """Load what PyTorch loads with its first step, a second that no client should be charged for."""
    fit(nn.Linear(1, 2), (torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)), Training(1), seed=0)


def evaluate(predict: Callable[[Tensor], Tensor], examples: Examples) -> tuple[float, float]:
    """Accuracy and mean loss of logits."""
    inputs, labels = examples
    with torch.no_grad():
        logits = torch.cat([predict(part) for part in inputs.split(_TEST_BATCH)])
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return accuracy, cross_entropy(logits, labels).item()


def _pull(model: nn.Module, proximal: float) -> Callable[[], Tensor | float]:
    """FedProx's term, mu / 2 times the squared distance (Li et al. 2020, arXiv 1812.06127)."""
    if not proximal:
        return lambda: 0.0
    start = [parameter.detach().clone() for parameter in model.parameters()]

    def term() -> Tensor:
        pairs = zip(model.parameters(), start, strict=True)
        return proximal / 2 * torch.stack([(now - then).square().sum() for now, then in pairs]).sum()

    return term


def _normalises(model: nn.Module) -> bool:
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
