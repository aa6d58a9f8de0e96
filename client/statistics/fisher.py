"""The diagonal Fisher information of a client's model on its own inputs.

    F = sum over examples of  E_{y ~ p(y | x)} (d log p(y | x) / d theta)^2

Source: Matena and Raffel 2022, arXiv 2111.09832. A sum over examples, so that of two data sets is the sum of
theirs; and it belongs to the weights that the model has now: collect it after aligning.
"""

from collections.abc import Iterator
from functools import partial
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedbasin.client.capture.layer_calls import layer_by_layer
from fedbasin.client.data import Batch, Batches, Inputs, evaluating, forward, read
from fedbasin.client.statistics.model_labels import EXACT_LABELS, label_scores
from fedbasin.strategies.tensors.state import State

# Numbers held at once beside the model and its activations: 2^24 float32 are 64 MiB.
GRADIENT_ELEMENTS = 2**24
# Each gradient also holds activations; small models have more of these than weights.
MOST_GRADIENTS = 256


def diagonal_fisher(
    model: nn.Module,
    batches: Batches,
    generator: torch.Generator | None = None,
    exact_labels: int = EXACT_LABELS,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of a classifier's trainable parameters, summed over examples.

    The gradient of each example is squared by itself; squaring a batch's mean gradient instead would mix signs
    and shrink the result with the batch. Only inputs are used: labels are the model's own. Where an example can
    have few, each is counted with its probability; where it can have many, one is drawn, which costs a gradient
    instead of one for each and is right on average. A model of tokens draws one at every place.

    Args:
        model: Runs in evaluation mode, so that examples do not meet in batch normalisation; left as it was.
        batches: The client's data, read once.
        generator: Draws labels, on the model's device.
        exact_labels: Places times classes up to which every label is looked at; 0 always draws.

    Returns:
        By parameter name, in the parameter's shape and dtype, float32 where that is shorter.

    Raises:
        ValueError: There is no data, or the model does not give logits of classes for its targets.
    """
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    gradients = GRADIENT_ELEMENTS // max(1, sum(p.numel() for p in parameters.values()))
    # Fused attention kernels have no rule for vmap and would be run example by example.
    with evaluating(model), layer_by_layer(), sdpa_kernel(SDPBackend.MATH):
        for batch in read(batches, model):
            with torch.no_grad():
                logits = forward(model, batch)
            scores = label_scores(logits, batch, generator, exact_labels)
            for few, some in _parts(batch, scores, gradients):
                square_each = vmap(partial(_squares, model, parameters))
                for name, square in square_each(few.inputs, few.targets, some).items():
                    sums[name] += square.sum(0)
    return {n: s.to(_widened(parameters[n]).dtype) for n, s in sums.items()}


def _parts(
    batch: Batch, scores: Float[Tensor, "batch labels numbers"], gradients: int
) -> Iterator[tuple[Batch, Float[Tensor, "few some numbers"]]]:
    """A few examples and labels at a time."""
    most = max(1, min(gradients, MOST_GRADIENTS))
    wide = min(most, scores.shape[1])
    for start in range(0, len(scores), most // wide):
        rows = slice(start, start + most // wide)
        few = batch.map(itemgetter(rows))
        for some in scores[rows].split(wide, 1):
            yield few, some


def _squares(
    model: nn.Module,
    parameters: State,
    inputs: Inputs,
    target: Tensor,
    scores: Float[Tensor, "some numbers"],
) -> dict[str, Tensor]:
    """Squared gradients of one example, summed over its labels."""
    example = Batch(inputs, target).map(lambda tensor: tensor.unsqueeze(0))

    def scored(values: State, score: Tensor) -> Tensor:
        return _widened(forward(model, example, values)[0]).flatten() @ score

    # The forward pass does not depend on the score, so it runs once for all of them.
    gradients = vmap(grad(scored), in_dims=(None, 0))(parameters, scores)
    return {name: _widened(gradient).square().sum(0) for name, gradient in gradients.items()}


def _widened(tensor: Tensor) -> Tensor:
    """At least float32: squares of half precision would underflow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
