"""Generated tasks on sequences of tokens, for transformers."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tests.protocol.task import Examples, Task

_TRAIN, _TEST = 4000, 1000
_FEW_TRAIN, _FEW_TEST = 1000, 500


def recall(length: int = 6, letters: int = 8) -> Task:
    """Which token follows the marker: attention has to look one place back."""

    def examples(count: int, draw: torch.Generator) -> Examples:
        tokens = torch.randint(letters, (count, length), generator=draw)
        place = torch.randint(length - 1, (count,), generator=draw)
        rows = torch.arange(count)
        labels = tokens[rows, place + 1]
        tokens[rows, place] = letters
        return tokens, labels

    return Task(*_both(examples), letters, tokens=letters + 1)


def modular_sum(length: int = 3, modulus: int = 10) -> Task:
    """The sum of all tokens modulo their number: no token alone says anything."""

    def examples(count: int, draw: torch.Generator) -> Examples:
        tokens: Int[Tensor, "count length"] = torch.randint(modulus, (count, length), generator=draw)
        return tokens, tokens.sum(1) % modulus

    return Task(*_both(examples), modulus, tokens=modulus)


def topics(length: int = 16, words: int = 32, classes: int = 10) -> Task:
    """Whose text it is: each of ten writers draws words with odds of their own. 1000 texts to train on, 500 to test."""
    draw = np.random.default_rng(0)
    odds = draw.dirichlet([0.2] * words, classes).cumsum(1)
    labels = np.arange(_FEW_TRAIN + _FEW_TEST) % classes
    thresholds = draw.random((len(labels), length, 1))
    texts = torch.tensor((thresholds < odds[labels][:, None]).argmax(2))
    named, end = torch.tensor(labels), _FEW_TRAIN
    return Task((texts[:end], named[:end]), (texts[end:], named[end:]), classes, tokens=words)


def _both(examples: Callable[[int, torch.Generator], Examples]) -> tuple[Examples, Examples]:
    draw = torch.Generator().manual_seed(0)
    return examples(_TRAIN, draw), examples(_TEST, draw)
