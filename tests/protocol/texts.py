"""Tasks on text that Python itself brings: the source of its standard library and the topics of its documentation."""

import inspect
from functools import cache
from importlib import import_module

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tests.protocol.task import Examples, Task

# Modules of one author's hand each, long ones, that every version of Python has.
MODULES = (
    "argparse",
    "ast",
    "datetime",
    "difflib",
    "doctest",
    "inspect",
    "mailbox",
    "pickletools",
    "statistics",
    "turtle",
)
_SYMBOLS = "\n !\"#$%&'()*+,-./0123456789:;<=>?@[]^_`abcdefghijklmnopqrstuvwxyz{|}~\\"
_TRAIN, _TEST = 250, 100  # passages of a module or of a group of topics


def modules(length: int = 48) -> Task:
    """Which of ten modules a passage of source comes from: 2500 and 1000 passages of `length` characters."""
    train, test = _passages([inspect.getsource(import_module(name)) for name in MODULES], length)
    return Task(_labelled(train), _labelled(test), len(MODULES), tokens=len(_SYMBOLS) + 1)


def topics_of_python(length: int = 48) -> Task:
    """The next character of Python's documentation: 2500 and 1000 passages; groups are ranges of its topics."""
    texts = _topics()
    groups = [" ".join(part) for part in np.array_split(np.array(texts, dtype=object), len(MODULES))]
    train, test = _passages(groups, length)
    source = torch.arange(len(groups)).repeat_interleave(_TRAIN)
    inputs, tests = torch.cat(train), torch.cat(test)
    symbols = len(_SYMBOLS) + 1
    return Task(
        (inputs, inputs),
        (tests, tests),
        symbols,
        tokens=symbols,
        groups=source,
        strata=source,
        kind="language-modelling",
    )


@cache
def _topics() -> list[str]:
    topics = import_module("pydoc_data.topics").topics
    return [topics[name] for name in sorted(topics)]


def _passages(texts: list[str], length: int) -> tuple[list[Tensor], list[Tensor]]:
    """Passages of each text to train on and to test on, from its first three quarters and from the rest."""
    train, test = [], []
    for seed, text in enumerate(texts):
        codes = torch.tensor([_SYMBOLS.find(letter) + 1 for letter in text.lower()])
        rng, end = np.random.default_rng(seed), 3 * len(codes) // 4
        train.append(_drawn(codes[:end], length, _TRAIN, rng))
        test.append(_drawn(codes[end:], length, _TEST, rng))
    return train, test


def _drawn(codes: Tensor, length: int, count: int, rng: np.random.Generator) -> Int[Tensor, "count length"]:
    starts = torch.tensor(rng.integers(len(codes) - length, size=(count, 1)))
    return codes[starts + torch.arange(length)]


def _labelled(parts: list[Tensor]) -> Examples:
    return torch.cat(parts), torch.arange(len(parts)).repeat_interleave(len(parts[0]))
