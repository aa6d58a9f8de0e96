"""Correlations between the features of anchor and client on the client's data: one pass, sums alone.

    C = sum over rows of  (z^a - mean) (z^k - mean)^T / (|z^a - mean| |z^k - mean|)        z the input of a layer that
                                                                                        reads a space

Activation matching maximises its agreement with C (`strategies/alignment/activation_matching.py`). A row is an example,
a token that is not padding, or a position of a convolution. The norms are those of a unit over all rows, or of all
entries of a block that rotates. What a layer writes, before the nonlinearity, counts where nothing reads it, and breaks
ties between units that are silent on the data. Correlations of what is read are those of Jordan et al. 2023 (REPAIR),
arXiv 2211.08403.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.strategies.capture.batchnorm_statistics import normalising_by_batch, read_normalised
from fedbasin.strategies.capture.layer_calls import LayerCall, LayerCalls, drop_padding, layer_by_layer
from fedbasin.strategies.capture.module_outputs import named_layers, observing
from fedbasin.strategies.diagnostics.evaluation import bind
from fedbasin.strategies.fusion.layers import Layer, gram_layers
from fedbasin.strategies.fusion.update import TRANSPOSED, tensor_names
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry
from fedbasin.strategies.tensors.batches import Batch, Batches, forward
from fedbasin.strategies.tensors.state import State

Rows = Float[Tensor, "channels rows"]

# By module, the axis of the weight along which its outputs lie.
_OUTPUT_AXIS = {nn.Linear: 0, nn.Conv1d: 0, nn.Conv2d: 0, nn.Conv3d: 0, nn.Embedding: 1}
# The part of what is written beside what is read: enough to break ties, and too little to decide anything else.
_WRITTEN = 1e-3
# Squares about the mean below this part of all squares are rounding.
_ROUNDING = 1e-10


@dataclass
class _FeatureSums:
    """Sums over the features along one axis of a weight.

    Attributes:
        role: role of the space's group.
        products: products of the anchor's features with the client's, in the group's own form.
        sums: sums of the features of anchor and client, `[width, 1]`.
        squares: sums of their squares.
        rows: number of rows.
    """

    role: int
    products: Tensor
    sums: tuple[Tensor, Tensor]
    squares: tuple[Tensor, Tensor]
    rows: int

    def add(self, more: "_FeatureSums") -> None:
        """Add the sums over more rows, in place."""
        self.products += more.products
        for total, part in zip((*self.sums, *self.squares), (*more.sums, *more.squares), strict=True):
            total += part
        self.rows += more.rows

    def correlation(self, space: Space) -> Tensor:
        """Return the products of the features' deviations from their means, over the norms of both."""
        anchor_mean, client_mean = (total / self.rows**0.5 for total in self.sums)
        centred = self.products - space.group.score(anchor_mean, client_mean, self.role)
        anchor, client = (self._inverse_norms(space, *pair) for pair in zip(self.sums, self.squares, strict=True))
        return centred * space.group.score(anchor, client, self.role)

    def _inverse_norms(self, space: Space, sums: Tensor, squares: Tensor) -> Tensor:
        # One norm for all entries of a block: a rotation mixes them.
        size = space.group.sizes[self.role]
        blocks = (squares - sums.square() / self.rows).reshape(-1, size).sum(1)
        is_rounding = blocks <= _ROUNDING * squares.reshape(-1, size).sum(1)
        return torch.where(is_rounding, 0.0, blocks.clamp_min(0).rsqrt()).repeat_interleave(size)[:, None]


@dataclass(frozen=True)
class _Place:
    """An axis of a weight: its inputs or its outputs."""

    weight: str
    dim: int


def correlations(
    symmetry: Symmetry, model: nn.Module, anchor: State, own: State, batches: Batches
) -> dict[str, tuple[Tensor, ...]]:
    """Return C for every role of every space, by the space's name, in double on the CPU.

    Features of a space are visible where a linear layer, a convolution, an embedding, or the joint projection of
    torch's own attention writes or reads them. Spaces that no layer writes are left out, and so are spaces that scale,
    whose roles need more than products. A role that no layer writes or reads, as the weights of a norm, is zero.
    BatchNorm normalises each batch by its own statistics, because those of an anchor that is a mean are of no model.

    Args:
        symmetry: the spaces.
        model: module that runs the states; it is left as it was.
        anchor: the global model.
        own: the client's model.
        batches: the client's data, read once; with BatchNorm, batches of one example are left out.

    Raises:
        ValueError: there is no data, or a state does not fit the model.
    """
    layers = named_layers(model, tuple(_OUTPUT_AXIS))
    # A subclass may lay its weight out in another way.
    modules = {name: layer for name, layer in layers.items() if type(layer) in _OUTPUT_AXIS}
    products = [layer for layer in gram_layers(model) if tensor_names(layer.block)[0] not in layers]
    writes = {name: _OUTPUT_AXIS[type(layer)] for name, layer in modules.items()}
    writes |= {tensor_names(layer.block)[0]: int(layer.block[0].endswith(TRANSPOSED)) for layer in products}
    grouped = {name for name, layer in modules.items() if getattr(layer, "groups", 1) > 1}
    bound = [bind(model, state) for state in (anchor, own)]
    sums: dict[str, dict[Axis, _FeatureSums]] = {}
    with normalising_by_batch(model), layer_by_layer(), torch.no_grad():
        for batch in read_normalised(batches, model):
            anchor_features, client_features = (
                _features(model, modules, products, writes, batch, state) for state in bound
            )
            visible = {place for place in anchor_features if place.dim == writes[place.weight]}
            visible |= {place for place in anchor_features if place.weight not in grouped}
            for space in symmetry.spaces:
                for axis in _visible_axes(space, writes, visible):
                    place = _Place(axis.tensor, axis.dim)
                    more = _multiply(space, axis, anchor_features[place], client_features[place])
                    _add(sums.setdefault(space.name, {}), axis, more)
    return {s.name: _by_role(s, sums[s.name], writes) for s in symmetry.spaces if s.name in sums}


def _visible_axes(space: Space, writes: Mapping[str, int], visible: Collection[_Place]) -> list[Axis]:
    """Return the axes of weights that write or read the space; none where no layer writes it."""
    element = space.group.identity()
    # A space that scales has roles dual to one another, and products of features do not determine its element.
    if any(dual != role for role, dual in enumerate(element.duals)):
        return []
    axes = [a for a in space.scored if a.outer is None and _Place(a.tensor, a.dim) in visible]
    return axes if any(axis.dim == writes[axis.tensor] for axis in axes) else []


def _features(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    products: Sequence[Layer],
    writes: Mapping[str, int],
    batch: Batch,
    state: State,
) -> dict[_Place, Rows]:
    features: dict[_Place, Rows] = {}

    def record(name: str, rows: Tensor, *, written: bool = True) -> None:
        place = _Place(name, writes[name] if written else 1 - writes[name])
        # A copy: layers behind this one may work in place.
        columns = rows.mT.to(torch.float64, copy=True)
        # A module that is called twice writes its space twice.
        features[place] = torch.cat([features[place], columns], 1) if place in features else columns

    def record_call(call: LayerCall) -> None:
        name = tensor_names(call.layer.block)[0]
        record(name, drop_padding(call.output, batch.mask, name))
        if call.kernel is None:
            record(name, drop_padding(call.inputs, batch.mask, name), written=False)

    observe_input = partial(record, written=False)
    with observing(modules, batch.mask, record, observe_input), LayerCalls(model, products, record_call, state):
        forward(model, batch, state)
    return features


def _multiply(space: Space, axis: Axis, anchor: Rows, client: Rows) -> _FeatureSums:
    width = space.width(axis.role)
    a, k = (replace(axis, dim=0).rows(features, width) for features in (anchor, client))
    # Matching runs on the CPU, and the sums are small.
    products = space.group.score(a, k, axis.role).cpu()
    sums = a.sum(1, True).cpu(), k.sum(1, True).cpu()
    squares = a.square().sum(1, True).cpu(), k.square().sum(1, True).cpu()
    return _FeatureSums(axis.role, products, sums, squares, a.shape[1])


def _add(sums: dict[Axis, _FeatureSums], axis: Axis, features: _FeatureSums) -> None:
    if axis in sums:
        sums[axis].add(features)
    else:
        sums[axis] = features


def _by_role(space: Space, sums: dict[Axis, _FeatureSums], writes: Mapping[str, int]) -> tuple[Tensor, ...]:
    roles: list[Tensor] = []
    for role in range(len(space.group.sizes)):
        zeros = torch.zeros(space.width(role), 1, dtype=torch.float64)
        total = space.group.score(zeros, zeros, role)
        axes = {axis: axis_sums for axis, axis_sums in sums.items() if axis_sums.role == role}
        is_read = any(axis.dim != writes[axis.tensor] for axis in axes)
        for axis, axis_sums in axes.items():
            share = _WRITTEN if is_read and axis.dim == writes[axis.tensor] else 1.0
            total = total + share * axis_sums.correlation(space)
        roles.append(total)
    return tuple(roles)
