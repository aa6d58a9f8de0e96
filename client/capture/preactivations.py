"""First and second moments of a model's preactivations on the client's data, layer by layer.

    rows,  sum over rows of z,  sum over rows of z^2        z the output of a linear layer or a convolution

What REPAIR compares (Jordan et al. 2023, arXiv 2211.08403). A row is an example, a token that is no padding, or a
position of a convolution's output.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.client.capture.layer_calls import layer_by_layer, unpadded
from fedbasin.client.data import Batches, evaluating, forward, read
from fedbasin.strategies.diagnostics.evaluation import bind
from fedbasin.strategies.diagnostics.variance_ratios import Moments
from fedbasin.strategies.tensors.state import State

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def preactivation_moments(model: nn.Module, state: State, batches: Batches) -> dict[str, Moments]:
    """Moments of every channel, by the name of the layer's weight.

    Layers that were never called as modules are left out; so is the output of `nn.MultiheadAttention`, which
    multiplies its weights itself. The model runs in evaluation mode and is left as it was.

    Raises:
        ValueError: There is no data, or the state does not fit the model.
    """
    sums: dict[str, Moments] = {}
    bound = bind(model, state)
    with evaluating(model), layer_by_layer(), torch.no_grad():
        for batch in read(batches, model):
            with ExitStack() as hooks:
                for name, layer in _layers(model):
                    see = partial(_see, sums, name, batch.mask)
                    hooks.callback(layer.register_forward_hook(see).remove)
                forward(model, batch, bound)
    return sums


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS):
            yield f"{name}.weight" if name else "weight", module


def _see(
    sums: dict[str, Moments],
    name: str,
    mask: Tensor | None,
    layer: nn.Module,
    inputs: tuple[Tensor, ...],  # noqa: ARG001 - the signature of a hook
    output: Tensor,
) -> None:
    moments = Moments.of(_rows(layer, output, mask, name))
    sums[name] = sums[name] + moments if name in sums else moments


def _rows(
    layer: nn.Module, output: Tensor, mask: Tensor | None, name: str
) -> Float[Tensor, "rows channels"]:
    if isinstance(layer, nn.Linear):
        return unpadded(output, mask, name)
    axis = output.ndim - len(layer.kernel_size) - 1  # type: ignore[arg-type] # every convolution has one
    return output.movedim(axis, -1).flatten(0, -2)
