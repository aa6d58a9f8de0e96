"""Closed-form heads: ridge regression from targets, on the inputs or on random features of them, in one round.

    W = (sum_k X_k^T X_k + lambda I)^-1  sum_k X_k^T Y_k

The sums are exact whatever the split is, so one round ends it. Random ReLU features of a seed need not travel.
After Fanì et al. 2024 (Fed3R, arXiv 2402.01477) and He et al. 2025 (AFL, arXiv 2405.16240).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from fedbasin.strategies.analytic.random_features import RandomFeatures
from tests.protocol.experiment import Experiment
from tests.protocol.spec import SpecError

Features = Callable[[Tensor], Float[Tensor, "example feature"]]

_NUMBER = 4  # bytes of a float32


def ridge(experiment: Experiment, strength: float = 1e-3) -> None:
    """On the inputs themselves."""
    _solve(experiment, experiment.task.vectors, strength)


def random_features(experiment: Experiment, width: int = 1024, strength: float = 1e-3) -> None:
    """On one random layer of ReLUs."""
    task = experiment.task
    inputs = task.vectors(task.train[0][:1]).shape[1]
    layer = RandomFeatures(inputs, task.classes, width, experiment.seed).features
    _solve(experiment, lambda x: torch.relu(layer(task.vectors(x))), strength)


def _solve(experiment: Experiment, features: Features, strength: float) -> None:
    task = experiment.task
    if task.kind in ("pixels", "language-modelling"):
        raise SpecError(f"a closed-form head predicts one row for an example, and this task is {task.kind}")

    def rows(inputs: Tensor) -> Tensor:
        return pad(features(inputs), (0, 1), value=1.0)

    gram, moment = torch.zeros(()), torch.zeros(())
    for client in range(len(experiment.slices)):
        with experiment.meter.client():
            inputs, targets = experiment.examples(client)
            x, y = rows(inputs), task.goals(targets)
            own = x.T @ x, x.T @ y
        gram, moment = gram + own[0].double(), moment + own[1].double()
        size = len(own[0])
        experiment.meter.bytes_up += _NUMBER * (size * (size + 1) // 2 + own[1].numel())
    ridge_term = strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    head = torch.linalg.solve(gram + ridge_term, moment).float()
    experiment.meter.bytes_down += _NUMBER * head.numel() * len(experiment.slices)
    experiment.measure(1, lambda inputs: rows(inputs) @ head)
