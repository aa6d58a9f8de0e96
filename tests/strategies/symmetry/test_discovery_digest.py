"""A symmetry that was discovered before is found again for the same model, and for no other."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.discover.digest import digest
from fedbasin.strategies.symmetry.discover.discovery import discover

EXAMPLE = (torch.zeros(2, 4),)


class Shuffled(nn.Module):
    """A layer whose outputs are read in the order of a buffer."""

    def __init__(self, order: list[int], *, activation: object = torch.relu, rate: float = 0.5) -> None:
        super().__init__()
        self.write = nn.Linear(4, 4)
        self.read = nn.Linear(4, 2)
        self.activation = activation
        self.rate = rate
        self.names = {"write", "read", "activation"}
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.write(x)) if self.activation in {torch.relu, torch.tanh} else self.write(x)
        return self.read(hidden[:, self.order] - self.running_mean)


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


def class_of(kind: str) -> type[nn.Module]:
    """Return one of two classes of the same name and file."""
    if kind == "relu":

        class Net(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(super().forward(x))
    else:

        class Net(nn.Linear):  # type: ignore[no-redef]
            def forward(self, x: Tensor) -> Tensor:
                return torch.tanh(super().forward(x))

    return Net


def with_other_parameters() -> nn.Module:
    torch.manual_seed(3)
    model = Shuffled([0, 1, 2, 3])
    model.running_mean += 1
    return model


def test_parameters_and_measured_buffers_do_not_enter() -> None:
    assert digest(Shuffled([0, 1, 2, 3]), EXAMPLE) == digest(with_other_parameters(), EXAMPLE)


@pytest.mark.parametrize(
    "other",
    [
        Shuffled([1, 0, 2, 3]),
        Shuffled([0, 1, 2, 3], activation=torch.tanh),
        Shuffled([0, 1, 2, 3], activation=scaled(2.0)),
        Shuffled([0, 1, 2, 3], rate=0.1),
    ],
    ids=["a constant buffer", "a function", "a lambda", "an attribute"],
)
def test_what_decides_the_function_enters(other: nn.Module) -> None:
    assert digest(Shuffled([0, 1, 2, 3]), EXAMPLE) != digest(other, EXAMPLE)


def test_a_closure_enters() -> None:
    models = (Shuffled([0, 1, 2, 3], activation=scaled(factor)) for factor in (2.0, 3.0))
    assert len({digest(model, EXAMPLE) for model in models}) == 2


def test_two_classes_of_one_name_are_two() -> None:
    models = (class_of(kind)(4, 2) for kind in ("relu", "tanh"))
    assert len({digest(model, EXAMPLE) for model in models}) == 2


def test_ties_and_examples_enter() -> None:
    apart = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert digest(apart, EXAMPLE) != digest(tied, EXAMPLE)
    assert digest(apart, EXAMPLE) != digest(apart, (torch.zeros(3, 4),))


def test_what_another_version_discovered_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(Shuffled([0, 1, 2, 3]), EXAMPLE)
    monkeypatch.setattr("fedbasin.strategies.symmetry.discover.digest._own_code", lambda: "another")
    assert digest(Shuffled([0, 1, 2, 3]), EXAMPLE) != before


def test_another_process_gives_the_same_digest() -> None:
    command = (
        "from tests.strategies.symmetry.test_discovery_digest import *; print(digest(Shuffled([0, 1, 2, 3]), EXAMPLE))"
    )
    # This process has another seed of its hashes.
    run = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split()[-1] == digest(Shuffled([0, 1, 2, 3]), EXAMPLE)


def test_a_cached_symmetry_is_the_discovered_one() -> None:
    cache: dict[str, str] = {}
    model = Shuffled([0, 1, 2, 3])
    first = discover(model, *EXAMPLE, cache=cache)
    assert len(cache) == 1
    assert discover(model, *EXAMPLE, cache=cache) == first
    assert discover(Shuffled([1, 0, 2, 3]), *EXAMPLE, cache=cache).symmetry
    assert len(cache) == 2
