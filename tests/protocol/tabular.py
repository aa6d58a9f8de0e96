"""Tasks that scikit-learn ships or generates, and a random teacher network."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_classification
from sklearn.model_selection import train_test_split
from torch import Tensor

from tests.protocol.task import Task

_GENERATED, _GENERATED_TRAIN = 4000, 2800
_PIXELS, _HIDDEN, _CLASSES = 64, 48, 10


def digits(sources: int = 0) -> Task:
    """1257 and 540 images of 8x8 pixels. Every closed form looks good on it: raw pixels give 0.94.

    Args:
        sources: number of scanners with a scale and an offset of their own, which `groups` shares out; 0 for one.
    """
    images, labels = load_digits(return_X_y=True)
    return with_sources(divided((images / 16).reshape(-1, 1, 8, 8), labels), sources)


def wine() -> Task:
    """124 and 54 wines of three growers, 13 measurements."""
    return standardised(divided(*load_wine(return_X_y=True)))


def cancer() -> Task:
    """398 and 171 tumours, benign or malignant, 30 measurements."""
    return standardised(divided(*load_breast_cancer(return_X_y=True)))


def clusters() -> Task:
    """Twenty gaussian clusters of ten classes, on 24 informative of 64 features."""
    features, labels = make_classification(
        _GENERATED,
        _PIXELS,
        n_informative=24,
        n_redundant=10,
        n_classes=_CLASSES,
        n_clusters_per_class=2,
        class_sep=2.0,
        random_state=1,
    )
    inputs = torch.tensor(features, dtype=torch.float32)
    return _cut((inputs - inputs.mean(0)) / inputs.std(0), torch.tensor(labels))


def teacher() -> Task:
    """The largest of ten outputs of a random network with 48 hidden units."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(_HIDDEN, _PIXELS, generator=draw) / 8
    head = torch.randn(_CLASSES, _HIDDEN, generator=draw)
    inputs = torch.randn(_GENERATED, _PIXELS, generator=draw)
    return _cut(inputs, (torch.tanh(2 * inputs @ hidden.T) @ head.T).argmax(1))


def _cut(inputs: Tensor, labels: Tensor) -> Task:
    end = _GENERATED_TRAIN
    return Task((inputs[:end], labels[:end]), (inputs[end:], labels[end:]), _CLASSES)


def divided(inputs: Any, labels: Any) -> Task:
    """Three tenths for the test, with each label's share."""
    parts = train_test_split(inputs.astype(np.float32), labels, test_size=0.3, random_state=0, stratify=labels)
    train, test, train_labels, test_labels = map(torch.tensor, parts)
    return Task((train, train_labels), (test, test_labels), len(np.unique(labels)))


def standardised(task: Task) -> Task:
    """Each measurement with mean 0 and deviation 1 on the training examples."""
    (train, labels), (test, test_labels) = task.train, task.test
    mean, deviation = train.mean(0), train.std(0)
    return replace(task, train=((train - mean) / deviation, labels), test=((test - mean) / deviation, test_labels))


def with_sources(task: Task, sources: int) -> Task:
    """The same examples measured by several instruments, each with a scale and an offset of its own for each number.

    Clients that have an instrument each differ in their inputs and not in their labels; the test has all of them.
    """
    if not sources:
        return task
    draw = torch.Generator().manual_seed(5)
    shape = (sources, *task.shape)
    scale, offset = torch.randn(shape, generator=draw).mul(0.3).exp(), 0.5 * torch.randn(shape, generator=draw)
    (train, labels), (test, test_labels) = task.train, task.test
    groups, others = (torch.randint(sources, (len(part),), generator=draw) for part in (train, test))
    seen = (scale[groups] * train + offset[groups], labels), (scale[others] * test + offset[others], test_labels)
    return replace(task, train=seen[0], test=seen[1], groups=groups)
