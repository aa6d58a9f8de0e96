"""Tasks whose targets are no classes of an example: numbers, several labels, a class for each pixel."""

from itertools import starmap

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_diabetes, load_digits, make_friedman1
from torch import Tensor

from tests.benchmarks import bench_served
from tests.protocol.tabular import with_sources
from tests.protocol.task import Examples, Task

# What can be said of a digit: odd, at least five, prime, a closed loop, a straight stroke, only straight strokes.
_SAYINGS = ({1, 3, 5, 7, 9}, {5, 6, 7, 8, 9}, {2, 3, 5, 7}, {0, 6, 8, 9}, {1, 2, 4, 5, 7}, {1, 4, 7})
_STRATA = 10
_SIDE, _TRAIN, _TEST = 16, 1500, 500


def diabetes() -> Task:
    """309 and 133 patients, ten measurements, how far the illness is after a year; standardised."""
    return _regression(*load_diabetes(return_X_y=True))


def friedman() -> Task:
    """2100 and 900 of Friedman's first function (1991): ten numbers, five of which count, and noise."""
    return _regression(*make_friedman1(3000, random_state=0))


def sayings() -> Task:
    """Six yes or no about each of scikit-learn's handwritten digits; clients differ in the digit."""
    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))
    inputs = torch.tensor(images[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor([[float(digit in saying) for saying in _SAYINGS] for digit in digits[order]])
    end = 7 * len(order) // 10
    train, test = (inputs[:end], labels[:end]), (inputs[end:], labels[end:])
    return Task(train, test, len(_SAYINGS), kind="multi-label", strata=torch.tensor(digits[order][:end]))


def scenes() -> Task:
    """Two digits in a noisy image of 16x16, and for each pixel which digit's ink it is, or none's: eleven classes."""
    images, digits = load_digits(return_X_y=True)
    end = 7 * len(digits) // 10
    order = np.random.default_rng(0).permutation(len(digits))
    pixels, names = images[order].reshape(-1, 8, 8) / 16, digits[order]
    train, strata = _scenes(pixels[:end], names[:end], _TRAIN, seed=1)
    test, _ = _scenes(pixels[end:], names[end:], _TEST, seed=2)
    return Task(train, test, 11, kind="pixels", strata=strata)


def colour_digits(sources: int = 0) -> Task:
    """scikit-learn's digits as colour images of 32x32, numbers from -1 to 1, as Flower's quickstart has CIFAR-10.

    Args:
        sources: number of cameras with a scale and an offset of their own, which `groups` shares out; 0 for one.
    """
    images, digits = bench_served.colour_digits()
    order = torch.tensor(np.random.default_rng(0).permutation(len(digits)))
    inputs, labels, end = images[order], digits[order], 7 * len(digits) // 10
    return with_sources(Task((inputs[:end], labels[:end]), (inputs[end:], labels[end:]), 10), sources)


def _regression(inputs: np.ndarray, numbers: np.ndarray) -> Task:
    """Three tenths for the test; inputs and targets standardised, strata of equal size by the target."""
    order = np.random.default_rng(0).permutation(len(numbers))
    end = 7 * len(order) // 10
    parts = [np.column_stack([inputs, numbers])[part] for part in (order[:end], order[end:])]
    mean, deviation = parts[0].mean(0), parts[0].std(0)
    train, test = (torch.tensor((part - mean) / deviation, dtype=torch.float32) for part in parts)
    strata = train[:, -1].argsort().argsort() * _STRATA // len(train)
    return Task((train[:, :-1], train[:, -1:]), (test[:, :-1], test[:, -1:]), 1, kind="regression", strata=strata)


def _scenes(pixels: np.ndarray, names: np.ndarray, count: int, seed: int) -> tuple[Examples, Int[Tensor, "count"]]:
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(names), size=(count, 2))
    # One in the upper half and one in the lower, so that none hides another.
    places = rng.integers(_SIDE - 8 + 1, size=(count, 2))
    drawn = list(starmap(_scene, zip(pixels[chosen], names[chosen], places, strict=True)))
    inputs = torch.tensor(np.stack([image for image, _ in drawn]), dtype=torch.float32)
    noise = torch.tensor(rng.normal(0, 0.2, inputs.shape), dtype=torch.float32)
    targets = torch.tensor(np.stack([inks for _, inks in drawn]))
    return ((inputs + noise)[:, None], targets), torch.tensor(names[chosen[:, 0]])


def _scene(
    pair: Float[np.ndarray, "2 8 8"], names: Int[np.ndarray, "2"], places: Int[np.ndarray, "2"]
) -> tuple[np.ndarray, np.ndarray]:
    image, inks = np.zeros((_SIDE, _SIDE)), np.zeros((_SIDE, _SIDE), dtype=np.int64)
    for half, (digit, name, place) in enumerate(zip(pair, names, places, strict=True)):
        window = np.s_[8 * half : 8 * half + 8, place : place + 8]
        image[window] = digit
        inks[window] = np.where(digit > 0.25, name + 1, 0)
    return image, inks
