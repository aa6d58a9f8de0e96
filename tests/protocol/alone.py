"""What clients reach without a merge: each one's model from its own initialisation, and the ensemble of them.

Neither is a model that a federation could serve. They say what a merge of independent models is to be held against.
"""

from collections.abc import Iterator
from statistics import fmean

import torch
from torch import Tensor, nn

from tests.protocol.experiment import Experiment
from tests.protocol.setting import Point
from tests.protocol.spec import SpecError
from tests.protocol.training import evaluate, fit


def alone(experiment: Experiment) -> None:
    """The mean of the clients' accuracies and of their losses."""
    with experiment.meter.nobody():
        task = experiment.task
        scores = [evaluate(model.eval(), task.test, task.kind) for model in _trained(experiment)]
    accuracies, losses = zip(*scores, strict=True)
    experiment.record(Point(1, fmean(accuracies), fmean(losses), client_seconds=experiment.meter.client_seconds))


def ensemble(experiment: Experiment) -> None:
    """The mean of the clients' probabilities, which no single model gives."""
    if experiment.task.kind != "classification":
        raise SpecError(f"an ensemble averages the probabilities of classes, and this task is {experiment.task.kind}")
    models = [model.eval() for model in _trained(experiment)]

    def predict(inputs: Tensor) -> Tensor:
        return torch.stack([model(inputs).softmax(1) for model in models]).mean(0).log()

    experiment.measure(1, predict)


def _trained(experiment: Experiment) -> Iterator[nn.Module]:
    for client in range(len(experiment.slices)):
        with experiment.meter.client():
            model = experiment.own_model(client)
            fit(
                model,
                experiment.examples(client),
                experiment.training,
                experiment.order(client, 1),
                kind=experiment.task.kind,
            )
        yield model
