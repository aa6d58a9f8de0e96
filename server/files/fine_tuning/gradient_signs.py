"""The signs in which a model's loss falls, by which entries of a task vector are kept or left out.

    kept_i = [ sign(tau_i) = sign(sum over examples of sign(-dL / dtheta_i)) ]

The signs of single examples vote, so that one example with a large gradient does not decide. What is kept lies in a
direction of descent: its inner product with the gradient of the votes is not positive. Source: Rinaldi et al. 2025
(GradFix), arXiv 2510.09658.
"""

from collections.abc import Iterator
from operator import itemgetter

import torch
from torch import Tensor, nn

from fedbasin.strategies.tasks.guess import task_of_batch
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read_batches


def descent_votes(model: nn.Module, batches: Batches, task: Task | None = None) -> dict[str, Tensor]:
    """Return for each parameter the number of examples whose loss falls with it, minus those whose loss rises.

    Args:
        model: the model, which runs in evaluation mode and keeps its parameters.
        batches: labelled examples; a few are enough, and each costs one gradient.
        task: the task; None takes the one that the first batch shows.

    Returns:
        the votes by name, also under the further names of tied parameters; zero where no gradient arrives.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    parameters = list(model.parameters())
    votes = {id(parameter): torch.zeros_like(parameter, requires_grad=False) for parameter in parameters}
    with evaluating(model), torch.enable_grad():
        for example in _examples(model, batches):
            outputs = forward(model, example)
            task = task or task_of_batch(outputs, example)
            loss = task.score(outputs, example)[0]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    votes[id(parameter)] -= gradient.sign()
    return {name: votes[id(parameter)] for name, parameter in names.items()}


def _examples(model: nn.Module, batches: Batches) -> Iterator[Batch]:
    for batch in read_batches(batches, model):
        for row in range(len(batch.targets)):
            yield batch.map(itemgetter(slice(row, row + 1)))
