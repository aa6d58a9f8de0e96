"""Gram matrices of the inputs of a model's layers, on a client's data.

    G = sum over rows of  [x; 1] [x; 1]^T

Source: Jin et al. 2023 (RegMean), arXiv 2212.09849. They are sums over examples, so the matrices of two data sets add
up to those of both together. They belong to the present weights: collect them after aligning.
"""

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.capture.layer_calls import LayerCall, LayerCalls, layer_by_layer
from fedbasin.strategies.fusion.compression.formats import Pieces
from fedbasin.strategies.fusion.layers import gram_layers
from fedbasin.strategies.statistics.gram_accumulators import GramAccumulator, finish_shared, shrink_off_diagonal
from fedbasin.strategies.statistics.shared_inputs import InputNumbers, SharedAccumulators
from fedbasin.strategies.tensors.batches import Batches, evaluating, forward, read_batches


def grams(
    model: nn.Module, batches: Batches, shrink: float = 1.0, blocks: Collection[Block] | None = None
) -> dict[Block, Tensor]:
    """Return the Gram matrices of the inputs of every linear map and every two-dimensional convolution.

    Keys are the names of a layer's tensors, `("fc.weight", "fc.bias")` or `("fc.weight",)`. Values are float64:
    `[in + 1, in + 1]` with the ones last where there is a bias, `[in, in]` where there is none, and one such matrix for
    each group of a grouped convolution. A row is a vector that the layer multiplies by `weight.flatten(1)`: one vector
    of a linear layer, one position of one example of a convolution. Rows are summed, not averaged, so least squares
    over them is least squares over everything that the layer computed, and an image of more positions counts more.

    Rows that are padding by the batch's mask are left out where the shape of the input shows them
    (`[batch, tokens, ..., in]` or `[batch * tokens, in]`). A layer that is used several times, under one name or more,
    has one Gram matrix under the first name. Weights that another kind of layer uses too, as an embedding tied to the
    head, are left out, because a Gram matrix would describe only one of the two uses. A layer that is never called has
    a matrix of zeros, so that every client sends statistics of the same layers.

    Args:
        model: the model, which runs in evaluation mode and is left as it was.
        batches: the client's data, read once.
        shrink: factor on the entries off the diagonal, RegMean's alpha; 1 keeps the Gram matrix as it is.
        blocks: the layers; None for all.

    Raises:
        ValueError: there is no data, `shrink` is outside [0, 1], or a mask does not fit a layer's input.
    """
    _check_shrink(shrink)
    accumulators = _accumulate(model, batches, {}, blocks)
    return finish_shared(accumulators, lambda total: shrink_off_diagonal(total.gram, shrink))


def gram_pieces(
    model: nn.Module,
    batches: Batches,
    shrink: float = 1.0,
    encodings: Mapping[Block, Encoding] | None = None,
    blocks: Collection[Block] | None = None,
) -> dict[Block, Pieces]:
    """Return the pieces in which Gram matrices are sent, by layer.

    Args:
        model: the model, as in `grams`.
        batches: the client's data, read once.
        shrink: factor on the entries off the diagonal.
        encodings: encodings of layers; a layer without one is sent as a triangle.
        blocks: the layers; None for all.

    Raises:
        ValueError: as in `grams`, or `shrink` is below 1 where a sketch is requested.
    """
    _check_shrink(shrink)
    accumulators = _accumulate(model, batches, encodings or {}, blocks)
    return finish_shared(accumulators, lambda total: total.pieces(shrink))


def _check_shrink(shrink: float) -> None:
    if not 0 <= shrink <= 1:
        raise ValueError(f"shrink = {shrink}; choose a factor from 0 (diagonal only) to 1 (all of it)")


def _accumulate(
    model: nn.Module, batches: Batches, encodings: Mapping[Block, Encoding], blocks: Collection[Block] | None
) -> dict[Block, GramAccumulator]:
    layers = [layer for layer in gram_layers(model) if blocks is None or layer.block in blocks]
    shared = SharedAccumulators(model, layers, encodings)
    with evaluating(model), layer_by_layer(), torch.no_grad():
        for batch in read_batches(batches, model):
            with LayerCalls(model, layers, partial(_add, shared, InputNumbers(), batch.mask)):
                forward(model, batch)
            shared.end_pass()
    return shared.accumulators


def _add(shared: SharedAccumulators, inputs: InputNumbers, mask: Tensor | None, call: LayerCall) -> None:
    accumulator = shared.accumulator_for(call.layer.block, inputs.number(call))
    if accumulator is not None:
        for rows in call.rows(mask):
            accumulator.add(rows)
