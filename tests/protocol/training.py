"""What every client does in every round, under every rule: a few epochs on its own examples, with AdamW or SGD."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tests.protocol.losses import loss_of, score
from tests.protocol.spec import SpecError, listed
from tests.protocol.task import Examples

_TEST_BATCH = 1000


@dataclass(frozen=True)
class Training:
    """A client's settings.

    Attributes:
        epochs: passes over the client's examples in a round.
        batch: examples of a step.
        rate: the optimizer's learning rate.
        decay: AdamW's weight decay.
        optimizer: `adamw`, or `sgd` with momentum .9.
        held: share of its examples that a client keeps for evaluation, at least one.
    """

    epochs: int = 5
    batch: int = 32
    rate: float = 1e-3
    decay: float = 1e-2
    optimizer: str = "adamw"
    held: float = 0.1

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """A new one for all parameters.

        Raises:
            SpecError: no optimizer has that name.
        """
        if self.optimizer not in OPTIMIZERS:
            raise SpecError(f"no optimizer is called {self.optimizer!r}; there are {listed(OPTIMIZERS)}")
        return OPTIMIZERS[self.optimizer](model, self)


# A step of the fused kernel costs half of one that goes from parameter to parameter.
OPTIMIZERS: dict[str, Callable[[nn.Module, Training], Optimizer]] = {
    "adamw": lambda model, own: AdamW(model.parameters(), own.rate, weight_decay=own.decay, fused=True),
    "sgd": lambda model, own: SGD(model.parameters(), own.rate, momentum=0.9),
}


def fit(
    model: nn.Module,
    examples: Examples,
    training: Training,
    seed: int,
    proximal: float = 0.0,
    kind: str = "classification",
) -> float:
    """Train in place; returns the last batch's loss.

    Args:
        model: as the server sent it.
        examples: the client's own.
        training: how.
        seed: of the order of examples.
        proximal: FedProx's mu, the pull back to the model as it was sent.
        kind: the kind of task, which gives the loss.
    """
    inputs, labels = examples
    penalty = _pull(model, proximal)
    optimiser = training.make_optimizer(model)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    loss = torch.tensor(0.0)
    for _ in range(training.epochs):
        for batch in torch.randperm(len(labels), generator=draw).split(training.batch):
            if len(batch) == 1 and _normalises(model):
                continue  # one example has no variance
            optimiser.zero_grad()
            loss = loss_of(kind, model(inputs[batch]), labels[batch])
            (loss + penalty()).backward()
            optimiser.step()
    return loss.item()


@cache
def warm_up() -> None:
    """Load what PyTorch loads with its first step, a second that no client should be charged for."""
    fit(nn.Linear(1, 2), (torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)), Training(1), seed=0)


def evaluate(
    predict: Callable[[Tensor], Tensor], examples: Examples, kind: str = "classification"
) -> tuple[float, float]:
    """Accuracy and mean loss of outputs; the accuracy is NaN where there is no right and wrong."""
    inputs, targets = examples
    with torch.no_grad():
        outputs = torch.cat([predict(part) for part in inputs.split(_TEST_BATCH)])
    return score(kind, outputs, targets)


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
