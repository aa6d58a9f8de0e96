"""The Kronecker factors of a client's curvature, layer by layer.

    A = sum over rows of  [x; 1] [x; 1]^T
    B = mean over rows of  E_{y ~ p(y | x)} g g^T        g = d log p(y | x) / d (W x + b)

A row is one vector of a linear layer, or one position of one example of a convolution. Source: Martens and Grosse
2015 (K-FAC), arXiv 1503.05671; for convolutions Grosse and Martens 2016, arXiv 1602.01407.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.capture.layer_calls import LayerCall, LayerCalls, layer_by_layer
from fedbasin.strategies.fusion.layers import Layer, kronecker_layers
from fedbasin.strategies.tasks.guess import task_of_batch
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batches, evaluating, forward, read_batches

# Share of the identity in B. See docs/explanation/fisher.md.
IDENTITY_SHARE = 0.5


@dataclass(eq=False)
class KroneckerFactors:
    """Sums over the rows of one layer, in double.

    Attributes:
        inputs: second moments of the inputs.
        gradients: second moments of the gradients at the outputs.
        rows: number of rows.
    """

    inputs: Float[Tensor, "inputs inputs"]
    gradients: Float[Tensor, "out out"]
    rows: int = 0

    @classmethod
    def zero(cls, layer: Layer, device: torch.device) -> "KroneckerFactors":
        """Return the sums over no rows."""
        inputs, gradients = (
            torch.zeros(size, size, dtype=torch.float64, device=device) for size in (layer.inputs, layer.outputs)
        )
        return cls(inputs, gradients)

    def add_inputs(self, call: LayerCall, mask: Tensor | None) -> None:
        """Add the inputs of a call, in place."""
        for (rows,) in call.rows(mask):
            self.inputs.addmm_(rows.mT, rows)
            self.rows += len(rows)

    def add_gradients(self, call: LayerCall, gradient: Tensor, mask: Tensor | None) -> None:
        """Add gradients at the output of a call, in place."""
        for (columns,) in call.columns(gradient, mask):
            self.gradients.addmm_(columns.mT, columns)

    @property
    def outputs(self) -> Float[Tensor, "out out"]:
        """The factor B, with a mean diagonal of one, half of it the identity.

        The scale is removed as for a Fisher diagonal: a confident client's gradients are orders of magnitude below a
        hesitant client's, which says nothing about whose weights are right. The identity is added because B has no more
        directions than there are classes, and a client with few examples has seen fewer. Without gradients B is the
        identity, which is RegMean.
        """
        identity = torch.eye(len(self.gradients)).to(self.gradients)
        mean = self.gradients.diagonal().mean()
        if not mean > 0:
            return identity
        return torch.lerp(self.gradients / mean, identity, IDENTITY_SHARE)


def kronecker_factors(
    model: nn.Module, batches: Batches, generator: torch.Generator | None = None, task: Task | None = None
) -> dict[Block, KroneckerFactors]:
    """Return the Kronecker factors of every linear map and every two-dimensional convolution that is trained.

    Rows are summed as for Gram matrices. Targets are the model's own, as for the diagonal Fisher information. Grouped
    convolutions are left out, and so are layers too wide for a square of their inputs or outputs.

    Args:
        model: the model, which runs in evaluation mode and is left as it was, without gradients.
        batches: the client's data, read once.
        generator: generator that draws targets, on the CPU.
        task: the task, which also says up to how many gradients the expectation is exact; None takes the one that the
            first batch shows.

    Raises:
        ValueError: there is no data, the targets do not fit the outputs, the likelihood is not known, or a mask does
            not fit a layer's input.
    """
    layers = kronecker_layers(model)
    factors = {
        layer.block: KroneckerFactors.zero(layer, model.get_parameter(layer.block[0]).device) for layer in layers
    }
    with evaluating(model), layer_by_layer(), torch.enable_grad():
        for batch in read_batches(batches, model):
            calls: list[LayerCall] = []
            with LayerCalls(model, layers, partial(_observe, factors, calls, batch.mask)):
                outputs = forward(model, batch)
            task = task or task_of_batch(outputs, batch)
            for score in task.label_scores(outputs, batch, generator).unbind(1):
                _add_gradients(factors, calls, task.arrange(outputs), score, batch.mask)
    return factors


def _observe(
    factors: Mapping[Block, KroneckerFactors], calls: list[LayerCall], mask: Tensor | None, call: LayerCall
) -> Tensor:
    calls.append(call)
    # Inputs are added at once and the model continues with a copy: later operations may write over both.
    with torch.no_grad():
        factors[call.layer.block].add_inputs(call, mask)
    return call.output.clone()


def _add_gradients(
    factors: Mapping[Block, KroneckerFactors],
    calls: list[LayerCall],
    numbers: Float[Tensor, " numbers"],
    score: Float[Tensor, "batch example_numbers"],
    mask: Tensor | None,
) -> None:
    """Add the gradients of one score of every example in a batch.

    One backward pass serves the whole batch: examples do not meet, so the gradient of each row is its own example's.
    """
    if not calls:
        return
    outputs = [call.output for call in calls]
    # The graph is retained for the next score; a layer that does not reach the outputs has no gradient.
    gradients = torch.autograd.grad(numbers, outputs, score.flatten(), retain_graph=True, allow_unused=True)
    for call, gradient in zip(calls, gradients, strict=True):
        if gradient is not None:
            factors[call.layer.block].add_gradients(call, gradient, mask)
