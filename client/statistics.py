"""What a client's data says about its weights: Gram matrices of inputs and the diagonal Fisher information.

    G = sum over rows of  [x; 1] [x; 1]^T
    F = sum over examples of  sum_y p(y | x) (d log p(y | x) / d theta)^2

Source: Gram matrices, Jin et al. 2023 (RegMean), arXiv 2212.09849; diagonal Fisher information, Matena and
Raffel 2022, arXiv 2111.09832. Both are sums over examples, so those of two data sets add up to those of both
together, and both belong to the weights that the model has now: collect them after aligning.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from operator import itemgetter
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import one_hot

from fedbasin.client.data import Batch, Batches, Inputs, evaluating, forward, read
from fedbasin.client.products import Product, Products, layer_by_layer
from fedbasin.client.totals import Total, nothing, shrunk
from fedbasin.strategies.fusion.compact import Encoding, Pieces
from fedbasin.strategies.fusion.layers import gram_layers
from fedbasin.strategies.fusion.update import Block
from fedbasin.strategies.state import State

Probabilities: TypeAlias = Float[Tensor, "batch classes"]
Labels: TypeAlias = Int[Tensor, "batch labels"]

# Numbers held at once beside the model and its activations: 2^24 float32 are 64 MiB.
GRADIENT_ELEMENTS = 2**24
# Each gradient also holds activations; small models have more of these than weights.
MOST_GRADIENTS = 256


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
    return {block: shrunk(total.gram, shrink) for block, total in totals.items()}


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
    return {block: total.weighing(shrink) for block, total in totals.items()}


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
    totals = {
        layer.block: nothing(
            layer,
            encodings.get(layer.block, Encoding()),
            model.get_parameter(layer.block[0]).device,
        )
        for layer in layers
    }
    with evaluating(model), layer_by_layer(), torch.no_grad():
        for batch in read(batches, model):
            with Products(model, layers, partial(_add, totals, batch.mask)):
                forward(model, batch)
    return totals


def _add(totals: Mapping[Block, Total], mask: Tensor | None, product: Product) -> None:
    for rows in product.rows(mask):
        totals[product.layer.block].add(rows)


def diagonal_fisher(
    model: nn.Module,
    batches: Batches,
    classes: Literal["exact", "sampled"] = "exact",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of a classifier's trainable parameters, summed over examples.

    The gradient of each example is squared by itself; squaring a batch's mean gradient instead would mix signs
    and shrink the result with the batch. Only inputs are used: labels come from the model, either every class
    with its probability or one drawn for each example, which costs a gradient instead of one for each class
    and is right on average.

    Args:
        model: Runs in evaluation mode, so that examples do not meet in batch normalisation; left as it was.
        batches: The client's data, read once.
        classes: "exact" for every class, "sampled" for one drawn label.
        generator: Draws the labels, on the model's device.

    Returns:
        By parameter name, in the parameter's shape and dtype, float32 where that is shorter.

    Raises:
        ValueError: There is no data, or the model does not give one row of logits for each example.
    """
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    gradients = GRADIENT_ELEMENTS // max(1, sum(p.numel() for p in parameters.values()))
    # Fused attention kernels have no rule for vmap and would be run example by example.
    with evaluating(model), layer_by_layer(), sdpa_kernel(SDPBackend.MATH):
        for batch in read(batches, model):
            probabilities = _probabilities(model, batch)
            labels = _every if classes == "exact" else partial(_drawn, generator=generator)
            for rows, scores in _scores(probabilities, *labels(probabilities), gradients):
                few = batch.map(itemgetter(rows))
                square_each = vmap(partial(_squares, model, parameters))
                squares = square_each(few.inputs, few.targets, scores)
                for name, square in squares.items():
                    sums[name] += square.sum(0)
    return {n: s.to(_widened(parameters[n]).dtype) for n, s in sums.items()}


def _probabilities(model: nn.Module, batch: Batch) -> Probabilities:
    with torch.no_grad():
        logits = forward(model, batch)
    if logits.shape[:-1] != batch.targets.shape[:1]:
        raise ValueError(
            f"logits {list(logits.shape)} for {len(batch.targets)} examples; the diagonal Fisher information "
            "is that of a classifier with logits [batch, classes]"
        )
    return _widened(logits).softmax(-1)


def _every(probabilities: Probabilities) -> tuple[Labels, Tensor]:
    """Each class, weighted with its probability."""
    labels = torch.arange(probabilities.shape[1], device=probabilities.device)
    return labels.expand_as(probabilities), probabilities


def _drawn(
    probabilities: Probabilities, generator: torch.Generator | None
) -> tuple[Labels, Tensor]:
    """One class for each example, drawn from the model."""
    labels = torch.multinomial(probabilities, 1, generator=generator)
    return labels, torch.ones_like(labels, dtype=probabilities.dtype)


def _scores(
    probabilities: Probabilities, labels: Labels, weights: Tensor, gradients: int
) -> Iterator[tuple[slice, Float[Tensor, "few some classes"]]]:
    """`sqrt(weight) d log p(y) / d logits = sqrt(weight) (e_y - p)`, for a few examples and labels at a time."""
    count, classes = probabilities.shape
    most = max(1, min(gradients, MOST_GRADIENTS))
    wide = min(most, labels.shape[1])
    for start in range(0, count, most // wide):
        rows = slice(start, start + most // wide)
        for y, w in zip(
            torch.split(labels[rows], wide, 1), torch.split(weights[rows], wide, 1), strict=True
        ):
            error = one_hot(y, classes) - probabilities[rows].unsqueeze(1)
            yield rows, w.sqrt().unsqueeze(-1) * error


def _squares(
    model: nn.Module,
    parameters: State,
    inputs: Inputs,
    target: Tensor,
    scores: Float[Tensor, "some classes"],
) -> dict[str, Tensor]:
    """Squared gradients of one example, summed over its labels."""
    example = Batch(inputs, target).map(lambda tensor: tensor.unsqueeze(0))

    def scored(values: State, score: Tensor) -> Tensor:
        return _widened(forward(model, example, values)[0]) @ score

    # The forward pass does not depend on the score, so it runs once for all of them.
    gradients = vmap(grad(scored), in_dims=(None, 0))(parameters, scores)
    return {name: _widened(gradient).square().sum(0) for name, gradient in gradients.items()}


def _widened(tensor: Tensor) -> Tensor:
    """At least float32: squares of half precision would underflow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
