"""Means and variances of a model's preactivations on the client's data, layer by layer.

    rows,  sum over rows of z,  sum over rows of z^2        z the output of a linear layer or a convolution

REPAIR compares these moments (Jordan et al. 2023, arXiv 2211.08403).
"""

import torch
from torch import Tensor, nn

from fedbasin.strategies.capture.layer_calls import layer_by_layer
from fedbasin.strategies.capture.module_outputs import named_layers, observing
from fedbasin.strategies.diagnostics.evaluation import bind
from fedbasin.strategies.diagnostics.variance_ratios import PreactivationMoments
from fedbasin.strategies.tensors.batches import Batches, evaluating, forward, read_batches
from fedbasin.strategies.tensors.state import State

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def preactivation_moments(model: nn.Module, state: State, batches: Batches) -> dict[str, PreactivationMoments]:
    """Return the moments of every channel, by the name of the layer's weight.

    Layers that are never called as modules are left out; so is the output of `nn.MultiheadAttention`, which
    multiplies its weights itself. The model runs in evaluation mode and is left as it was.

    Raises:
        ValueError: there is no data, or the state does not fit the model.
    """
    sums: dict[str, PreactivationMoments] = {}

    def add(name: str, rows: Tensor) -> None:
        moments = PreactivationMoments.of(rows)
        sums[name] = sums[name] + moments if name in sums else moments

    bound, layers = bind(model, state), named_layers(model, _LAYERS)
    with evaluating(model), layer_by_layer(), torch.no_grad():
        for batch in read_batches(batches, model):
            with observing(layers, batch.mask, add):
                forward(model, batch, bound)
    return sums
