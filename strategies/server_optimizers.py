"""Server steps: what a round's fused model does to the global one.

    Replace     theta <- theta + lr (fused - theta)                      FedAvg
    Average     theta <- theta + (fused - theta) / r                     the mean of all rounds' fused models
    Ema         theta <- theta + (1 - decay) (fused - theta)
    Momentum    m <- beta m + (fused - theta),  theta <- theta + lr m    FedAvgM, Hsu et al. 2019, arXiv 1909.06335
    Adam, Yogi  theta <- theta + lr m / (sqrt(v) + tau)                  Reddi et al. 2021, arXiv 2003.00295

A step is a value; what it remembers from round to round goes in and comes out as tensors, which a checkpoint
keeps. Tensors that are no floating point are the fused model's, and so are BatchNorm's running statistics: they are
measured and not learned, and a variance that goes on in its direction falls below zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fedbasin.strategies.tensors.state import MEASURED, State, floating, interpolate

Memory: TypeAlias = dict[str, Tensor]
Stepped: TypeAlias = tuple[dict[str, Tensor], Memory]


class Step(Protocol):
    """How the global model follows."""

    def __call__(self, model: State, fused: State, number: int, memory: State) -> Stepped:
        """One step.

        Args:
            model: the global model that the round began with.
            fused: what the round's stages ended in.
            number: of the round, from 1.
            memory: what the step before left; empty at first.

        Returns:
            the new global model, and what the next step needs.
        """
        ...


@dataclass(frozen=True)
class Replace:
    """Go to the fused model, or part of the way."""

    lr: float = 1.0

    def __call__(self, model: State, fused: State, number: int, memory: State) -> Stepped:
        del number
        return _towards(model, fused, self.lr), dict(memory)


@dataclass(frozen=True)
class Average:
    """The mean over rounds, each with the same weight; the first round's model alone at first."""

    def __call__(self, model: State, fused: State, number: int, memory: State) -> Stepped:
        return _towards(model, fused, 1 / number), dict(memory)


@dataclass(frozen=True)
class Ema:
    """The exponential mean over rounds; the first round's model alone at first."""

    decay: float = 0.5

    def __call__(self, model: State, fused: State, number: int, memory: State) -> Stepped:
        share = 1.0 if number == 1 else 1 - self.decay
        return _towards(model, fused, share), dict(memory)


@dataclass(frozen=True)
class Momentum:
    """Go on in the direction of the rounds before."""

    beta: float = 0.9
    lr: float = 1.0

    def __call__(self, model: State, fused: State, number: int, memory: State) -> Stepped:
        del number
        velocity = {
            f"velocity.{name}": self.beta * memory.get(f"velocity.{name}", 0.0) + change
            for name, change in _changes(model, fused).items()
        }
        return _moved(model, fused, lambda name: self.lr * velocity[f"velocity.{name}"]), velocity


@dataclass(frozen=True)
class Adam:
    """Every weight at its own rate: the change over the root of its mean square."""

    lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __call__(self, model: State, fused: State, number: int, memory: State) -> Stepped:
        del number
        return _adaptive(self, model, fused, memory, self._square)

    def _square(self, before: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * before + (1 - self.beta2) * square


@dataclass(frozen=True)
class Yogi(Adam):
    """As Adam, with a mean square that forgets only as fast as it learns."""

    def _square(self, before: Tensor, square: Tensor) -> Tensor:
        return before - (1 - self.beta2) * square * torch.sign(before - square)


def _adaptive(
    step: Adam,
    model: State,
    fused: State,
    memory: State,
    mean_square: Callable[[Tensor, Tensor], Tensor],
) -> Stepped:
    kept: Memory = {}
    for name, change in _changes(model, fused).items():
        first, second = memory.get(f"first.{name}"), memory.get(f"second.{name}")
        first = torch.zeros_like(change) if first is None else first
        second = torch.full_like(change, step.tau**2) if second is None else second
        kept[f"first.{name}"] = step.beta1 * first + (1 - step.beta1) * change
        kept[f"second.{name}"] = mean_square(second, change.square())

    def move(name: str) -> Tensor:
        return step.lr * kept[f"first.{name}"] / (kept[f"second.{name}"].sqrt() + step.tau)

    return _moved(model, fused, move), kept


def _towards(model: State, fused: State, share: float) -> dict[str, Tensor]:
    return dict(fused) if share == 1 else interpolate(model, fused, share)


def _changes(model: State, fused: State) -> dict[str, Tensor]:
    return {name: fused[name].double() - tensor.double() for name, tensor in _learned(model)}


def _learned(model: State) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in floating(model).items():
        if not name.endswith(MEASURED):
            yield name, tensor


def _moved(model: State, fused: State, by: Callable[[str], Tensor]) -> dict[str, Tensor]:
    moved = {
        name: (tensor.double() + by(name)).to(tensor.dtype) for name, tensor in _learned(model)
    }
    return {**fused, **moved}


STEPS: dict[str, Step] = {
    "replace": Replace(),
    "average": Average(),
    "ema": Ema(),
    "momentum": Momentum(),
    "adam": Adam(),
    "yogi": Yogi(),
}
