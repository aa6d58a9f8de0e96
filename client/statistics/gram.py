"""What a client's data says about its weights: Gram matrices of the inputs of its layers.

    G = sum over rows of  [x; 1] [x; 1]^T

Source: Jin et al. 2023 (RegMean), arXiv 2212.09849. Sums over examples, so those of two data sets add up to those
of both together, and they belong to the weights that the model has now: collect them after aligning.
"""

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from fedbasin.client.capture.layer_calls import Product, Products, layer_by_layer
from fedbasin.client.data import Batches, evaluating, forward, read
from fedbasin.client.statistics.gram_accumulators import Total, finished, shrunk
from fedbasin.client.statistics.shared_inputs import Inputs, Shared
from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.compression.formats import Pieces
from fedbasin.strategies.fusion.layers import gram_layers


def grams(model: nn.Module, batches: Batches, shrink: float = 1.0) -> dict[Block, Tensor]:
    """Gram matrices of the inputs of every linear map and every two-dimensional convolution.

    Keys are the tensors of a layer, `("fc.weight", "fc.bias")` or `("fc.weight",)`. Values are float64,
    `[in + 1, in + 1]` with the ones last where there is a bias, `[in, in]` where there is none, and one such
    matrix for each group of a grouped convolution. A row is what the layer multiplies with `weight.flatten(1)`:
    one vector of a linear layer, one position of one example of a convolution. Rows are summed, not averaged, so least squares over them is least squares over everything
    that the layer computed, and an image of more positions counts for more.

    Rows that the batch's mask calls padding are left out where they can be told from the input's shape
    (`[batch, tokens, ..., in]` or `[batch * tokens, in]`). A layer that is used several times, under one name
    or several, has one Gram under the first name. Left out are weights that another kind of layer uses too (an
    embedding tied to the head), for which the Gram would be half the story. A layer that was never called has a
    Gram of zeros, so that every client says something of the same layers.

    Args:
        model: Runs in evaluation mode; left as it was.
        batches: The client's data, read once.
        shrink: Factor on the entries off the diagonal, RegMean's alpha; 1 keeps the Gram as it is.

    Raises:
        ValueError: There is no data, `shrink` is outside [0, 1], or a mask does not fit a layer's input.
    """
    _check_shrink(shrink)
    totals = _totals(model, batches, {}, None)
    return finished(totals, lambda total: shrunk(total.gram, shrink))


def gram_pieces(
    model: nn.Module,
    batches: Batches,
    shrink: float = 1.0,
    encodings: Mapping[Block, Encoding] | None = None,
    blocks: Collection[Block] | None = None,
) -> dict[Block, Pieces]:
    """The same as it is sent: of each Gram matrix the pieces of its form, a triangle where nothing else is asked.

    Args:
        model: as for `grams`.
        batches: likewise.
        shrink: likewise.
        encodings: how layers are sent.
        blocks: the layers that are wanted; all, if None.

    Raises:
        ValueError: as `grams`; or `shrink` is below 1 where a sketch is asked for.
    """
    _check_shrink(shrink)
    totals = _totals(model, batches, encodings or {}, blocks)
    return finished(totals, lambda total: total.weighing(shrink))


def _check_shrink(shrink: float) -> None:
    if not 0 <= shrink <= 1:
        raise ValueError(
            f"shrink = {shrink}; choose a factor from 0 (diagonal only) to 1 (all of it)"
        )


def _totals(
    model: nn.Module,
    batches: Batches,
    encodings: Mapping[Block, Encoding],
    blocks: Collection[Block] | None,
) -> dict[Block, Total]:
    layers = [layer for layer in gram_layers(model) if blocks is None or layer.block in blocks]
    shared = Shared(model, layers, encodings)
    with evaluating(model), layer_by_layer(), torch.no_grad():
        for batch in read(batches, model):
            with Products(model, layers, partial(_add, shared, Inputs(), batch.mask)):
                forward(model, batch)
            shared.end()
    return shared.totals


def _add(shared: Shared, inputs: Inputs, mask: Tensor | None, product: Product) -> None:
    total = shared.read(product.layer.block, inputs.number(product))
    if total is not None:
        for rows in product.rows(mask):
            total.add(rows)
