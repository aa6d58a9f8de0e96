"""Feature regression: what a client says about layers that are fitted to what its own model computes there.

    W* = argmin_W  sum_k || W X~_k - Z_k ||^2        X~_k  inputs, computed by the layers already fused
                                                     Z_k   outputs, computed by client k's own model

A client sends `X~ X~^T` and `Z X~^T`: sums over its examples, no label, no gradient, no single row. RegMean is
the case in which the fused inputs are the client's own. Where an output is added to a residual stream or
normalised, the sum or the normalised image is what is fitted (`reach`). With labels in the place of Z a last
layer has its closed form.

Source: RegMean, Jin et al. 2023, arXiv 2212.09849; RegMean++, Nguyen et al. 2025, arXiv 2508.03121 (targets
`W_k X~_k`); closed-form heads, Fani et al. 2024 (Fed3R), arXiv 2402.01989, and Zhuang et al. 2024 (AFL),
arXiv 2405.16240.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedbasin.client.data import Batch, Batches, evaluating, forward, read
from fedbasin.client.products import Product, Products, layer_by_layer
from fedbasin.client.reach import Reach, Reaches
from fedbasin.strategies.fusion.layers import Layer, gram_layers
from fedbasin.strategies.fusion.update import Block, Order
from fedbasin.strategies.recipe import Target
from fedbasin.strategies.state import State

# A label as logits: so much for its own class, so much less for every other.
MARGIN = 5.0


@dataclass(frozen=True, eq=False)
class Sums:
    """One layer's normal equations over a client's examples, in double.

    Attributes:
        gram: `X~ X~^T`, `[in, in]`, with the ones last where there is a bias; one for each group of a
            grouped convolution.
        moment: `Z X~^T`, `[out, in]`.
    """

    gram: Float[Tensor, "*groups inputs inputs"]
    moment: Float[Tensor, "out inputs"]


class FlowError(ValueError):
    """A model whose course depends on its weights, so that its layers cannot be compared."""


def order(model: nn.Module, batches: Batches) -> Order:
    """Read the order of the layers off one batch.

    Raises:
        ValueError: there is no data.
    """
    seen: list[Product] = []
    with evaluating(model), layer_by_layer(), torch.no_grad():
        batch = next(read(batches, model))
        with Products(model, gram_layers(model), seen.append):
            logits = forward(model, batch)
    first = {product.layer.block: product for product in reversed(seen)}
    ordered = sorted(first, key=[product.layer.block for product in seen].index)
    levels = groupby(ordered, key=lambda block: id(first[block].inputs))
    head = seen[-1].layer.block if seen and seen[-1].output is logits else None
    return Order(tuple(tuple(level) for _, level in levels), head)


def regress(
    model: nn.Module,
    own: State,
    fused: State,
    blocks: Sequence[Block],
    target: Target,
    batches: Batches,
) -> dict[Block, Sums]:
    """The normal equations of some layers.

    Between the layers of one request the client's own weights are at work, so several levels may be asked for
    at once.

    Args:
        model: to run; its tensors are replaced.
        own: the client's model, in the frame of the others.
        fused: the model so far; floating tensors that it lacks are the client's own.
        blocks: the layers.
        target: what they are fitted to.
        batches: the client's data, read once.

    Raises:
        ValueError: there is no data, a block is none of the model's layers, or labels do not fit the output.
        FlowError: the two models do not run through the layers in the same way.
    """
    layers = _chosen(model, blocks)
    mine = {name: own[name] for block in blocks for name in block}
    model.load_state_dict({**model.state_dict(), **fused, **mine})
    teacher = _teacher(model, own) if target is Target.features else None
    sums = {layer.block: _nothing(layer, model) for layer in layers}
    with evaluating(model), layer_by_layer(), torch.no_grad():
        for batch in read(batches, model):
            wanted = iter(_run(teacher, layers, batch)) if teacher else None
            for product, reach in _run(model, layers, batch):
                own_reach = _matching(next(wanted, None), product) if wanted else None
                goal = _goal(target, product, reach, batch, own_reach)
                _add(sums[product.layer.block], product, goal, batch.mask)
    return sums


def _chosen(model: nn.Module, blocks: Sequence[Block]) -> list[Layer]:
    known = {layer.block: layer for layer in gram_layers(model)}
    if strange := [block for block in blocks if block not in known]:
        raise ValueError(
            f"{'+'.join(strange[0])} is no linear layer or convolution of this {type(model).__name__}; use the "
            "same model class as the server"
        )
    return [known[block] for block in blocks]


def _teacher(model: nn.Module, own: State) -> nn.Module:
    teacher = deepcopy(model)
    teacher.load_state_dict({**model.state_dict(), **own})
    return teacher.eval()


def _nothing(layer: Layer, model: nn.Module) -> Sums:
    weight = model.get_parameter(layer.block[0])
    shape = (layer.groups,) if layer.groups > 1 else ()
    zeros = partial(torch.zeros, dtype=torch.float64, device=weight.device)
    return Sums(zeros((*shape, layer.inputs, layer.inputs)), zeros((len(weight), layer.inputs)))


def _run(model: nn.Module, layers: Sequence[Layer], batch: Batch) -> list[tuple[Product, Reach]]:
    """The products of one forward pass, each with where its output has got to."""
    seen: list[tuple[Product, Reach]] = []
    reaches = Reaches()

    def see(product: Product) -> None:
        seen.append((product.copy(), reaches.follow(product.output)))

    with reaches, Products(model, layers, see):
        forward(model, batch)
    return seen


def _matching(own: tuple[Product, Reach] | None, product: Product) -> Reach:
    if own is None or own[0].layer != product.layer:
        raise FlowError(
            f"{product.layer.block[0]} is not used in the same place by the client's model and by the fused "
            "one; a model whose course depends on its weights needs the recipe regmean or fedavg"
        )
    return own[1]


def _goal(
    target: Target, product: Product, reach: Reach, batch: Batch, own: Reach | None
) -> Tensor:
    if target is Target.labels:
        return _logits(batch.targets, product)
    # Without a teacher the layer's own weights say what they would have given.
    return product.output if own is None else reach.back(own.value)


def _logits(labels: Tensor, product: Product) -> Tensor:
    output = product.output
    if labels.shape != output.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"targets {labels.dtype} {list(labels.shape)} for logits {list(output.shape)}; a closed-form head "
            "needs one class index for each row of logits"
        )
    return one_hot(labels, output.shape[-1]) * (2 * MARGIN) - MARGIN


def _add(sums: Sums, product: Product, goal: Tensor, mask: Tensor | None) -> None:
    gram = sums.gram.view(-1, *sums.gram.shape[-2:])
    moment = sums.moment.view(len(gram), -1, sums.moment.shape[-1])
    for rows, columns in zip(product.rows(mask), product.columns(goal, mask), strict=True):
        gram.baddbmm_(rows.mT, rows)
        moment.baddbmm_(columns.mT, rows)
