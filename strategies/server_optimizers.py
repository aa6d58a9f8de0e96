"""Server optimizers: rules by which the global model follows the fused model of each round.

    Replace     theta <- theta + lr (fused - theta)                      FedAvg
    Average     theta <- theta + (fused - theta) / r                     the mean of all rounds' fused models
    Ema         theta <- theta + (1 - decay) (fused - theta)
    Momentum    m <- beta m + (fused - theta),  theta <- theta + lr m    FedAvgM, Hsu et al. 2019, arXiv 1909.06335
    Adam, Yogi  theta <- theta + lr m / (sqrt(v) + tau)                  Reddi et al. 2021, arXiv 2003.00295

A server optimizer is a frozen value. Its state goes in and comes out as named tensors, which a checkpoint stores. Two
kinds of tensors are copied from the fused model instead of optimized: integer tensors, and BatchNorm's running
statistics, which are measured and not learned; a variance that is extrapolated falls below zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fedbasin.strategies.tensors.parallel import is_finite
from fedbasin.strategies.tensors.state import MEASURED, State, floating, interpolate

OptimizerState: TypeAlias = dict[str, Tensor]
# The new global model, and the state that the next round's step starts from.
OptimizerStep: TypeAlias = tuple[dict[str, Tensor], OptimizerState]


class ServerOptimizer(Protocol):
    """A rule that moves the global model towards, or beyond, the fused model of a round."""

    def __call__(self, model: State, fused: State, number: int, optimizer_state: State) -> OptimizerStep:
        """Return the new global model and the new optimizer state.

        Args:
            model: the global model at the start of the round.
            fused: the model that the round's stages ended in.
            number: number of the round, from 1.
            optimizer_state: state returned in the previous round; empty in the first.
        """
        ...


@dataclass(frozen=True)
class Replace:
    """A step of length `lr` towards the fused model; 1 replaces the global model."""

    lr: float = 1.0

    def __call__(self, model: State, fused: State, number: int, optimizer_state: State) -> OptimizerStep:
        del number
        return _mix(model, fused, self.lr), dict(optimizer_state)


@dataclass(frozen=True)
class Average:
    """The mean of all rounds' fused models, each with the same weight."""

    def __call__(self, model: State, fused: State, number: int, optimizer_state: State) -> OptimizerStep:
        return _mix(model, fused, 1 / number), dict(optimizer_state)


@dataclass(frozen=True)
class Ema:
    """The exponential moving average of all rounds' fused models; it starts at the first of them."""

    decay: float = 0.5

    def __call__(self, model: State, fused: State, number: int, optimizer_state: State) -> OptimizerStep:
        # The first round replaces the model: the initial weights are random and must not stay in the average.
        fraction = 1.0 if number == 1 else 1 - self.decay
        return _mix(model, fused, fraction), dict(optimizer_state)


@dataclass(frozen=True)
class Momentum:
    """Gradient descent with momentum on the rounds' changes (FedAvgM)."""

    beta: float = 0.9
    lr: float = 1.0

    def __call__(self, model: State, fused: State, number: int, optimizer_state: State) -> OptimizerStep:
        del number
        velocity = {
            f"velocity.{name}": self.beta * optimizer_state.get(f"velocity.{name}", 0.0) + change
            for name, change in _changes(model, fused).items()
        }
        new = _add_changes(model, fused, lambda name: self.lr * velocity[f"velocity.{name}"])
        return new, velocity


@dataclass(frozen=True)
class Adam:
    """Adam on the rounds' changes: each weight has its own rate (FedAdam)."""

    lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __call__(self, model: State, fused: State, number: int, optimizer_state: State) -> OptimizerStep:
        del number
        state: OptimizerState = {}
        for name, change in _changes(model, fused).items():
            mean = optimizer_state.get(f"first.{name}")
            square = optimizer_state.get(f"second.{name}")
            mean = torch.zeros_like(change) if mean is None else mean
            # Reddi et al. begin at tau^2 and do not correct the bias: the first rounds' steps stay small.
            square = torch.full_like(change, self.tau**2) if square is None else square
            state[f"first.{name}"] = self.beta1 * mean + (1 - self.beta1) * change
            state[f"second.{name}"] = self._mean_square(square, change.square())

        def step(name: str) -> Tensor:
            return self.lr * state[f"first.{name}"] / (state[f"second.{name}"].sqrt() + self.tau)

        return _add_changes(model, fused, step), state

    def _mean_square(self, mean: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * mean + (1 - self.beta2) * square


@dataclass(frozen=True)
class Yogi(Adam):
    """Adam with a mean square that changes by at most (1 - beta2) of the new square (FedYogi)."""

    def _mean_square(self, mean: Tensor, square: Tensor) -> Tensor:
        return mean - (1 - self.beta2) * square * torch.sign(mean - square)


def _mix(model: State, fused: State, fraction: float) -> dict[str, Tensor]:
    # Interpolating with 1 would round; replacing is exact.
    return dict(fused) if fraction == 1 else interpolate(model, fused, fraction)


def _changes(model: State, fused: State) -> dict[str, Tensor]:
    # In double: the difference of near weights in bfloat16 has few digits, and velocities add them up.
    return {name: fused[name].double() - tensor.double() for name, tensor in _learned(model)}


def _learned(model: State) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in floating(model).items():
        # A tensor with infinite entries, as a mask of -inf, is copied: a difference of two infinities is no number.
        if not name.endswith(MEASURED) and is_finite(tensor):
            yield name, tensor


def _add_changes(model: State, fused: State, step: Callable[[str], Tensor]) -> dict[str, Tensor]:
    new = {name: (tensor.double() + step(name)).to(tensor.dtype) for name, tensor in _learned(model)}
    return {**fused, **new}


SERVER_OPTIMIZERS: dict[str, ServerOptimizer] = {
    "replace": Replace(),
    "average": Average(),
    "ema": Ema(),
    "momentum": Momentum(),
    "adam": Adam(),
    "yogi": Yogi(),
}
