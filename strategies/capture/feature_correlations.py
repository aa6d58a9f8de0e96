"""Cross-covariances between the features of anchor and client on the client's data: one pass, sums alone.

    C = sum over rows of  z^a (z^k)^T  -  (sum z^a)(sum z^k)^T / rows        z the output of a layer that writes a space

Activation matching maximises its agreement with C (`strategies/alignment/activation_matching.py`). A row is an example,
a token that is not padding, or a position of a convolution's output.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.strategies.capture.layer_calls import LayerCall, LayerCalls, drop_padding, layer_by_layer
from fedbasin.strategies.capture.module_outputs import named_layers, observing
from fedbasin.strategies.diagnostics.evaluation import bind
from fedbasin.strategies.fusion.layers import Layer, gram_layers
from fedbasin.strategies.fusion.update import TRANSPOSED, tensor_names
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry
from fedbasin.strategies.tensors.batches import Batch, Batches, evaluating, forward, read_batches
from fedbasin.strategies.tensors.state import State

Rows = Float[Tensor, "channels rows"]

# By module, the axis of the weight along which its outputs lie.
_OUTPUT_AXIS = {nn.Linear: 0, nn.Conv1d: 0, nn.Conv2d: 0, nn.Conv3d: 0, nn.Embedding: 1}


@dataclass
class _FeatureSums:
    """Sums over the features of one layer that writes a space.

    Attributes:
        role: role of the space's group that the layer writes.
        products: products of the anchor's features with the client's, in the group's own form.
        anchor, client: sums of the features, `[width, 1]`.
        rows: number of rows.
    """

    role: int
    products: Tensor
    anchor: Tensor
    client: Tensor
    rows: int

    def add(self, sums: "_FeatureSums") -> None:
        """Add the sums over more rows, in place."""
        self.products += sums.products
        self.anchor += sums.anchor
        self.client += sums.client
        self.rows += sums.rows

    def centred(self, space: Space) -> Tensor:
        """Return the products of the features' deviations from their means."""
        scale = self.rows**0.5
        return self.products - space.group.score(self.anchor / scale, self.client / scale, self.role)


def correlations(
    symmetry: Symmetry, model: nn.Module, anchor: State, own: State, batches: Batches
) -> dict[str, tuple[Tensor, ...]]:
    """Return C for every role of every space, by the space's name, in double on the CPU.

    Features of a space are visible where a layer writes them: a linear layer, a convolution, an embedding, or the joint
    projection of torch's own attention. Spaces that no layer writes are left out, and so are spaces that scale, whose
    roles need more than products. A role that no layer writes, as the weights of a norm, is zero.

    Args:
        symmetry: the spaces.
        model: module that runs the states; it runs in evaluation mode and is left as it was.
        anchor: the global model.
        own: the client's model.
        batches: the client's data, read once.

    Raises:
        ValueError: there is no data, or a state does not fit the model.
    """
    layers = named_layers(model, tuple(_OUTPUT_AXIS))
    # A subclass may lay its weight out in another way.
    modules = {name: layer for name, layer in layers.items() if type(layer) in _OUTPUT_AXIS}
    products = [layer for layer in gram_layers(model) if tensor_names(layer.block)[0] not in layers]
    writers = {name: _OUTPUT_AXIS[type(layer)] for name, layer in modules.items()}
    writers |= {tensor_names(layer.block)[0]: int(layer.block[0].endswith(TRANSPOSED)) for layer in products}
    bound = [bind(model, state) for state in (anchor, own)]
    sums: dict[str, dict[Axis, _FeatureSums]] = {}
    with evaluating(model), layer_by_layer(), torch.no_grad():
        for batch in read_batches(batches, model):
            anchor_features, client_features = (_features(model, modules, products, batch, state) for state in bound)
            for space in symmetry.spaces:
                for axis in _visible_axes(space, writers, anchor_features):
                    features = anchor_features[axis.tensor], client_features[axis.tensor]
                    _add(sums.setdefault(space.name, {}), axis, _multiply(space, axis, *features))
    return {s.name: _by_role(s, sums[s.name]) for s in symmetry.spaces if s.name in sums}


def _visible_axes(space: Space, writers: Mapping[str, int], features: Mapping[str, Rows]) -> Iterator[Axis]:
    """Yield the axes of weights that write the space, each as the axis of those features."""
    element = space.group.identity()
    # A space that scales has roles dual to one another, and products of features do not determine its element.
    if any(dual != role for role, dual in enumerate(element.duals)):
        return
    for axis in space.scored:
        is_visible = axis.tensor in features and axis.outer is None
        if is_visible and axis.dim == writers[axis.tensor]:
            yield replace(axis, dim=0)


def _features(
    model: nn.Module, modules: Mapping[str, nn.Module], products: Sequence[Layer], batch: Batch, state: State
) -> dict[str, Rows]:
    features: dict[str, Rows] = {}

    def record(name: str, rows: Tensor) -> None:
        columns = rows.mT.double()
        # A module that is called twice writes its space twice.
        features[name] = torch.cat([features[name], columns], 1) if name in features else columns

    def record_call(call: LayerCall) -> None:
        name = tensor_names(call.layer.block)[0]
        record(name, drop_padding(call.output, batch.mask, name))

    with observing(modules, batch.mask, record), LayerCalls(model, products, record_call, state):
        forward(model, batch, state)
    return features


def _multiply(space: Space, axis: Axis, anchor: Rows, client: Rows) -> _FeatureSums:
    width = space.width(axis.role)
    a, k = (axis.rows(features, width) for features in (anchor, client))
    products = space.group.score(a, k, axis.role)
    # Matching runs on the CPU, and the sums are small.
    sums = a.sum(1, True).cpu(), k.sum(1, True).cpu()
    return _FeatureSums(axis.role, products.cpu(), *sums, a.shape[1])


def _add(sums: dict[Axis, _FeatureSums], axis: Axis, features: _FeatureSums) -> None:
    if axis in sums:
        sums[axis].add(features)
    else:
        sums[axis] = features


def _by_role(space: Space, sums: dict[Axis, _FeatureSums]) -> tuple[Tensor, ...]:
    roles: list[Tensor] = []
    for role in range(len(space.group.sizes)):
        zeros = torch.zeros(space.width(role), 1, dtype=torch.float64)
        total = space.group.score(zeros, zeros, role)
        for axis_sums in sums.values():
            if axis_sums.role == role:
                total = total + axis_sums.centred(space)
        roles.append(total)
    return tuple(roles)
