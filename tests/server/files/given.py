"""Functions that a user would name on the command line: a module, and data of several kinds."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def model() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.zeros(1, 4)


def rows() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        yield torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator)


def wider_rows() -> Iterator[tuple[Tensor, Tensor]]:
    for inputs, targets in rows():
        yield 2 * inputs.roll(1, 1) + 1, targets


def numbers() -> list[tuple[Tensor, Tensor]]:
    return [(x, x[:, :3]) for x, _ in rows()]


def tokens() -> list[dict[str, Tensor]]:
    ids = torch.arange(12).view(2, 6)
    return [{"input_ids": ids, "labels": ids}]


def inputs() -> list[Tensor]:
    return [x for x, _ in rows()]


def padded() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])}]


def wide() -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(5, 7), torch.zeros(5).long())]


def nothing() -> list[Tensor]:
    return []


def fails() -> None:
    raise OSError("no such disk")


def ends(*_: object) -> None:
    raise SystemExit(3)


number = 5


def closeness(path: Path) -> float:
    """Return a score that is highest for the model in target.safetensors beside another."""
    global calls
    calls += 1
    target = load_file(path.with_name("target.safetensors"))
    return -sum(float((tensor - target[name]).square().sum()) for name, tensor in load_file(path).items())


calls = 0


def fails_on(path: Path) -> float:
    raise OSError("no such disk")


def not_a_number(path: Path) -> float:
    return float("nan")


def normed() -> tuple[nn.Module, Tensor]:
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)
    return nn.Sequential(*layers), torch.zeros(2, 4)


def single_rows() -> list[tuple[Tensor, Tensor]]:
    return [(inputs[:1], targets[:1]) for inputs, targets in rows()]


def decoded() -> list[dict[str, Tensor]]:
    (batch,) = tokens()
    ids = batch["labels"]
    return [{**batch, "decoder_input_ids": torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)}]
