"""Feature regression: what a client says about layers that are fitted to what its own model computes there.

    W* = argmin_W  sum_k || W X~_k - Z_k ||^2        X~_k  inputs, computed by the layers already fused
                                                     Z_k   outputs, computed by client k's own model

A client sends `X~ X~^T` and `(Z - W X~) X~^T`, W the layer that is fitted as it is so far: sums over its
examples, no label, no gradient, no single row. What is left to explain, and not what is wanted, because then an
inexact `X~ X~^T` only changes how far one stage gets. RegMean is the case in which the fused inputs are the
client's own. Where an output is added to a residual stream or
normalised, the sum or the normalised image is what is fitted (`reach`). With one at an example's class in the place
of Z, the sums are those of each class, which a last layer has a closed form for.

Source: RegMean, Jin et al. 2023, arXiv 2212.09849; RegMean++, Nguyen et al. 2025, arXiv 2508.03121 (targets
`W_k X~_k`); closed-form heads, Fani et al. 2024 (Fed3R), arXiv 2402.01989, and Zhuang et al. 2024 (AFL),
arXiv 2405.16240.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedbasin.client.capture.batchnorm_statistics import find_norms
from fedbasin.client.capture.layer_calls import Product, Products, layer_by_layer
from fedbasin.client.data import Batch, Batches, evaluating, forward, read
from fedbasin.client.refit.invertible_path import Reach, Reaches
from fedbasin.client.statistics.gram_accumulators import Total
from fedbasin.client.statistics.shared_inputs import Inputs, Shared
from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block, LayerGraph
from fedbasin.strategies.fusion.layers import Layer, gram_layers
from fedbasin.strategies.fusion.update import join, stored
from fedbasin.strategies.recipes import Target
from fedbasin.strategies.tensors.state import State, tied

# Which layer multiplied, and the shape of what it gave.
Use: TypeAlias = tuple[Layer, torch.Size]
Kept = TypeVar("Kept")


class FlowError(ValueError):
    """A model whose course depends on its weights, so that its layers cannot be compared with another's."""


@dataclass(frozen=True, eq=False)
class Sums:
    """One layer's normal equations over a client's examples, in double.

    Attributes:
        inputs: `X~ X~^T`, with the ones last where there is a bias; one for each group of a grouped
            convolution. Layers that read the same tensors have it in common, the same object.
        moment: `(Z - W X~) X~^T`, `[out, in]`.
    """

    inputs: Total
    moment: Float[Tensor, "out inputs"]

    @property
    def gram(self) -> Float[Tensor, "*groups inputs inputs"]:
        """The inputs' Gram matrix as far as it is known."""
        return self.inputs.gram


def read_layer_graph(model: nn.Module, batches: Batches) -> LayerGraph:
    """Read the layer graph off one batch, and the BatchNorms off the modules.

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
    return LayerGraph(tuple(tuple(level) for _, level in levels), head, find_norms(model))


def regress(
    model: nn.Module,
    own: State,
    fused: State,
    blocks: Sequence[Block],
    target: Target,
    batches: Batches,
    encodings: Mapping[Block, Encoding] | None = None,
) -> dict[Block, Sums]:
    """The normal equations of some layers.

    Several levels may be asked for at once. Behind a layer that is fitted to features the model goes on with what
    the client's own model computes there, as if it had been fitted already; with other targets, with what the
    client's own weights make of the inputs.

    Args:
        model: to run; its tensors are replaced.
        own: the client's model, in the frame of the others.
        fused: the model so far; floating tensors that it lacks are the client's own.
        blocks: the layers.
        target: what they are fitted to.
        batches: the client's data, read once.
        encodings: how the sums will be sent; a sketch is made while reading.

    Raises:
        ValueError: there is no data, a block is none of the model's layers, or labels do not fit the output.
        FlowError: the two models do not run through the layers in the same way.
    """
    layers = _chosen(model, blocks)
    bases = {block: _base(block, fused, target) for block in blocks}
    mine = {name: own[name] for block in blocks for name in stored(block)}
    _load(model, {**fused, **mine})
    teacher = _teacher(model, own) if target is Target.features else None
    shared, moments = Shared(model, layers, encodings or {}), _nothing(model, layers)
    with evaluating(model), layer_by_layer(), torch.no_grad():
        for batch in read(batches, model):
            for product, number, goal in _goals(model, teacher, layers, target, batch):
                block = product.layer.block
                total = shared.read(block, number)
                _add(total, moments[block], product, goal, bases[block], batch.mask)
            shared.end()
    return {block: Sums(total, moments[block]) for block, total in shared.totals.items()}


def _goals(
    model: nn.Module,
    teacher: nn.Module | None,
    layers: Sequence[Layer],
    target: Target,
    batch: Batch,
) -> Iterator[tuple[Product, int, Tensor]]:
    """The products of the model that is fitted on one batch, with the number of what each reads and its goal."""
    numbers: list[int] = []
    wanted = _run(teacher, layers, batch, _use) if teacher else []
    seen = _run(model, layers, batch, partial(_copy, Inputs(), numbers), wanted)
    own: Sequence[Reach | None] = _matching(wanted, seen) if teacher else [None] * len(seen)
    for (product, reach), number, own_reach in zip(seen, numbers, own, strict=True):
        yield product, number, _goal(target, product, reach, batch, own_reach)


def _load(model: nn.Module, state: State) -> None:
    """Replace tensors, those that stand under several names by what the first of them says."""
    known = {**model.state_dict(), **state}
    model.load_state_dict({name: known[first] for name, first in tied(model.state_dict()).items()})


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
    _load(teacher, own)
    return teacher.eval()


def _nothing(model: nn.Module, layers: Sequence[Layer]) -> dict[Block, Tensor]:
    return {
        layer.block: _zeros(model.get_parameter(stored(layer.block)[0]), layer) for layer in layers
    }


def _zeros(weight: Tensor, layer: Layer) -> Tensor:
    return torch.zeros(layer.outputs, layer.inputs, dtype=torch.float64, device=weight.device)


def _copy(inputs: Inputs, numbers: list[int], product: Product) -> Product:
    numbers.append(inputs.number(product))
    return product.copy()


def _run(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: Batch,
    keep: Callable[[Product], Kept],
    leading: Sequence[tuple[Use, Reach]] = (),
) -> list[tuple[Kept, Reach]]:
    """What is to be kept of each product of one forward pass, with where its output has got to.

    Behind the products the values of those that lead, another model's, are read.
    """
    seen: list[tuple[Kept, Reach]] = []
    reaches = Reaches()

    def see(product: Product) -> None:
        use, lead = leading[len(seen)] if len(seen) < len(leading) else (None, None)
        kept = keep(product)
        seen.append((kept, reaches.follow(product.output, lead if use == _use(product) else None)))

    with reaches, Products(model, layers, see):
        forward(model, batch)
    return seen


def _matching(
    own: Sequence[tuple[Use, Reach]], seen: Sequence[tuple[Product, Reach]]
) -> list[Reach]:
    """Where the products of the client's own model have got to, each beside the same one of the fused model."""
    uses = [_use(product) for product, _ in seen]
    for ours, theirs in zip_longest(map(itemgetter(0), own), uses):
        if ours != theirs:
            raise FlowError(
                f"{(ours or theirs)[0].block[0]} is not used in the same place by the client's model and by the "
                "fused one; a model whose course depends on its weights needs the recipe regmean or fedavg"
            )
    return [reach for _, reach in own]


def _use(product: Product) -> Use:
    return product.layer, product.output.shape


def _goal(
    target: Target, product: Product, reach: Reach, batch: Batch, own: Reach | None
) -> Tensor:
    if target is Target.labels:
        return _classes(batch, product)
    # Without a teacher the layer's own weights say what they would have given.
    return product.output if own is None else reach.back(own.value)


def _classes(batch: Batch, product: Product) -> Tensor:
    """One at an example's class, so that its moment sums the inputs of each class."""
    labels, output = batch.targets, product.output
    if labels.shape != output.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"targets {labels.dtype} {list(labels.shape)} for logits {list(output.shape)}; a closed-form head "
            "needs one class index for each row of logits"
        )
    if batch.mask is not None and batch.mask.shape == labels.shape:
        labels = labels.where(batch.mask, 0)  # padding often has a label that is no class
    classes = output.shape[-1]
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(
            f"targets from {int(labels.min())} to {int(labels.max())} for {classes} logits; a closed-form head needs class indices "
            f"from 0 to {classes - 1}, and rows without one left out by the batch's mask"
        )
    return one_hot(labels, classes)


def _base(block: Block, fused: State, target: Target) -> Tensor:
    """What is there already: the layer as it was fused; of a head to labels, nothing."""
    base = join(block, fused).double()
    return torch.zeros_like(base) if target is Target.labels else base


def _add(
    inputs: Total | None,
    moment: Tensor,
    product: Product,
    goal: Tensor,
    base: Tensor,
    mask: Tensor | None,
) -> None:
    """Add one product; its inputs only where no other layer has added them."""
    groups = product.layer.groups
    moment, base = (each.unflatten(0, (groups, -1)) for each in (moment, base.to(moment.device)))
    for rows, columns in zip(product.rows(mask), product.columns(goal, mask), strict=True):
        if inputs is not None:
            inputs.add(rows)
        moment.baddbmm_((columns - rows @ base.mT).mT, rows)
