"""Small classifiers that have learnt something, and the data on which they did."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedbasin.strategies.diagnostics.barrier import Evaluate
from fedbasin.strategies.tensors.state import State

SITES = "hidden  S(16)  0.weight[0] 0.bias[0] 2.weight[1]"


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def examples(seed: int, count: int = 60) -> tuple[Tensor, Tensor]:
    """Products decide the class, so that no two models find the same hidden units."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return inputs, inputs.reshape(-1, 3, 2).prod(-1).argmax(1)


def learnt(seed: int, steps: int = 60) -> dict[str, Tensor]:
    model, (inputs, targets) = mlp(seed), examples(0, 200)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def on(inputs: Tensor, targets: Tensor) -> Evaluate:
    """Evaluates a state on this data."""
    model = mlp()

    def evaluate(state: State) -> tuple[float, float, float]:
        dtype = state["0.weight"].dtype
        with torch.no_grad():
            logits = functional_call(model, dict(state), (inputs.to(dtype),)).double()
        loss = cross_entropy(logits, targets, reduction="sum")
        return float(loss), float((logits.argmax(1) == targets).sum()), float(len(targets))

    return evaluate
