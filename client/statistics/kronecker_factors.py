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

from fedbasin.client.capture.layer_calls import Product, Products, layer_by_layer
from fedbasin.client.data import Batches, evaluating, forward, read
from fedbasin.client.statistics.model_labels import EXACT_LABELS, label_scores
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.layers import Layer, kronecker_layers

# Share of B that is the same for all outputs. See docs/fisher.md.
ALIKE = 0.5


@dataclass(eq=False)
class Factors:
    """Sums over the rows so far, in double.

    Attributes:
        inputs: second moments of the inputs.
        gradients: second moments of the gradients at the outputs.
        rows: how many there were.
    """

    inputs: Float[Tensor, "inputs inputs"]
    gradients: Float[Tensor, "out out"]
    rows: int = 0

    @classmethod
    def zero(cls, layer: Layer, device: torch.device) -> "Factors":
        """Of no rows."""
        inputs, gradients = (
            torch.zeros(size, size, dtype=torch.float64, device=device)
            for size in (layer.inputs, layer.outputs)
        )
        return cls(inputs, gradients)

    def read(self, product: Product, mask: Tensor | None) -> None:
        """Add the inputs of a product, in place."""
        for (rows,) in product.rows(mask):
            self.inputs.addmm_(rows.mT, rows)
            self.rows += len(rows)

    def learn(self, product: Product, gradient: Tensor, mask: Tensor | None) -> None:
        """Add gradients at the product's output, in place."""
        for (columns,) in product.columns(gradient, mask):
            self.gradients.addmm_(columns.mT, columns)

    @property
    def outputs(self) -> Float[Tensor, "out out"]:
        """B, with a mean diagonal of one, half of it the same for all outputs.

        As for a Fisher diagonal: a confident client's gradients are orders of magnitude below a hesitant one's,
        which says nothing about whose weights are right. And there are no more directions in it than classes, of
        which a client of few examples knows fewer. Without gradients all outputs are alike, which is RegMean.
        """
        alike = torch.eye(len(self.gradients)).to(self.gradients)
        mean = self.gradients.diagonal().mean()
        return torch.lerp(self.gradients / mean, alike, ALIKE) if mean > 0 else alike


def kronecker_factors(
    model: nn.Module,
    batches: Batches,
    generator: torch.Generator | None = None,
    exact_labels: int = EXACT_LABELS,
) -> dict[Block, Factors]:
    """Kronecker factors of every linear map and every two-dimensional convolution that is trained.

    Rows are summed as for Gram matrices. Labels are the model's own, as for the diagonal Fisher information. Left
    out are grouped convolutions and layers too wide for a square of their inputs or outputs.

    Args:
        model: runs in evaluation mode; left as it was, and no gradient is left on it.
        batches: the client's data, read once.
        generator: draws labels, on the model's device.
        exact_labels: places times classes up to which every label is looked at; 0 always draws.

    Raises:
        ValueError: there is no data, the model gives no logits of classes for its targets, or a mask does not fit
            a layer's input.
    """
    layers = kronecker_layers(model)
    found = {
        layer.block: Factors.zero(layer, model.get_parameter(layer.block[0]).device)
        for layer in layers
    }
    with evaluating(model), layer_by_layer(), torch.enable_grad():
        for batch in read(batches, model):
            seen: list[Product] = []
            with Products(model, layers, partial(_see, found, seen, batch.mask)):
                logits = forward(model, batch)
            for score in label_scores(logits, batch, generator, exact_labels).unbind(1):
                _learn(found, seen, logits, score, batch.mask)
    return found


def _see(
    found: Mapping[Block, Factors], seen: list[Product], mask: Tensor | None, product: Product
) -> Tensor:
    """Read the inputs at once and let the model go on with a copy of the output: later steps may write over both."""
    seen.append(product)
    with torch.no_grad():
        found[product.layer.block].read(product, mask)
    return product.output.clone()


def _learn(
    found: Mapping[Block, Factors],
    seen: list[Product],
    logits: Tensor,
    score: Float[Tensor, "batch numbers"],
    mask: Tensor | None,
) -> None:
    """Examples do not meet, so one backward pass serves all of a batch: each row's gradient is its own."""
    if not seen:
        return
    weights = score.view_as(logits).to(logits.dtype)
    outputs = [product.output for product in seen]
    gradients = torch.autograd.grad(logits, outputs, weights, retain_graph=True, allow_unused=True)
    for product, gradient in zip(seen, gradients, strict=True):
        if gradient is not None:
            found[product.layer.block].learn(product, gradient, mask)
