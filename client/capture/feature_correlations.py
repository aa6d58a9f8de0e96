"""How the features of anchor and client correlate on the client's data: one pass, sums alone.

    C = sum over rows of  z^a (z^k)^T  -  (sum z^a)(sum z^k)^T / rows        z the output of a layer that writes a space

What activation matching maximises (`strategies/alignment/activation_matching.py`). A row is an example, a token that is no
padding, or a position of a convolution's output.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedbasin.client.capture.layer_calls import layer_by_layer, unpadded
from fedbasin.client.data import Batch, Batches, evaluating, forward, read
from fedbasin.strategies.diagnostics.evaluation import bind
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry
from fedbasin.strategies.tensors.state import State

Rows = Float[Tensor, "channels rows"]

# The axis of the weight that its outputs are numbered by.
_OUTPUT_AXIS = {nn.Linear: 0, nn.Conv1d: 0, nn.Conv2d: 0, nn.Conv3d: 0, nn.Embedding: 1}


@dataclass
class _Sums:
    """Of one writer of a space: products of features, and features.

    Attributes:
        role: which of the group's feature spaces it writes.
        products: as the group keeps them.
        anchor, client: sums of the features, `[width, 1]`.
        rows: how many.
    """

    role: int
    products: Tensor
    anchor: Tensor
    client: Tensor
    rows: int

    def centred(self, space: Space) -> Tensor:
        """The products of deviations from the mean."""
        scale = self.rows**0.5
        return self.products - space.group.score(
            self.anchor / scale, self.client / scale, self.role
        )


def correlations(
    symmetry: Symmetry, model: nn.Module, anchor: State, own: State, batches: Batches
) -> dict[str, tuple[Tensor, ...]]:
    """C of every role of every space, by space name, in double on the CPU.

    A space is seen where a module of its own writes it: a linear layer, a convolution or an embedding. Spaces that none
    writes are left out, as are those that stretch, whose roles need more than products; a role that none writes, such as
    a norm's gains, is zero.

    Args:
        symmetry: the spaces.
        model: lends its architecture; it runs in evaluation mode and is left as it was.
        anchor: the global model.
        own: the client's.
        batches: the client's data, read once.

    Raises:
        ValueError: there is no data, or a state does not fit the model.
    """
    writers = dict(_writers(model))
    bound = [bind(model, state) for state in (anchor, own)]
    sums: dict[str, dict[Axis, _Sums]] = {}
    with evaluating(model), layer_by_layer(), torch.no_grad():
        for batch in read(batches, model):
            ours, theirs = (_features(model, writers, batch, state) for state in bound)
            for space in symmetry.spaces:
                for axis in _seen(space, writers, ours):
                    found = _products(space, axis, ours[axis.tensor], theirs[axis.tensor])
                    _add(sums.setdefault(space.name, {}), axis, found)
    return {s.name: _by_role(s, sums[s.name]) for s in symmetry.spaces if s.name in sums}


def _writers(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    """Each weight that writes features, with its module and the axis of its outputs."""
    for name, module in model.named_modules():
        if type(module) in _OUTPUT_AXIS:
            yield f"{name}.weight" if name else "weight", (module, _OUTPUT_AXIS[type(module)])


def _seen(
    space: Space, writers: dict[str, tuple[nn.Module, int]], features: dict[str, Rows]
) -> Iterator[Axis]:
    """The axes that write the space, with the axis that their features have."""
    element = space.group.identity()
    if any(dual != role for role, dual in enumerate(element.duals)):
        return
    for axis in space.scored:
        known = axis.tensor in features and axis.outer is None
        if known and axis.dim == writers[axis.tensor][1]:
            yield replace(axis, dim=0)


def _features(
    model: nn.Module, writers: dict[str, tuple[nn.Module, int]], batch: Batch, state: State
) -> dict[str, Rows]:
    features: dict[str, Rows] = {}
    with ExitStack() as hooks:
        for name, (module, _) in writers.items():
            see = partial(_see, features, name, batch.mask)
            hooks.callback(module.register_forward_hook(see).remove)
        forward(model, batch, state)
    return features


def _see(
    features: dict[str, Rows],
    name: str,
    mask: Tensor | None,
    module: nn.Module,
    inputs: tuple[Tensor, ...],  # noqa: ARG001 - the signature of a hook
    output: Tensor,
) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        rows = unpadded(output, mask, name)
    else:
        axis = output.ndim - len(module.kernel_size) - 1  # type: ignore[arg-type] # every convolution has one
        rows = output.movedim(axis, -1).flatten(0, -2)
    seen = rows.mT.double()
    features[name] = torch.cat([features[name], seen], 1) if name in features else seen


def _products(space: Space, axis: Axis, ours: Rows, theirs: Rows) -> _Sums:
    width = space.width(axis.role)
    a, k = (axis.rows(each, width) for each in (ours, theirs))
    score = space.group.score(a, k, axis.role)
    return _Sums(axis.role, score.cpu(), a.sum(1, True).cpu(), k.sum(1, True).cpu(), a.shape[1])


def _add(sums: dict[Axis, _Sums], axis: Axis, found: _Sums) -> None:
    if axis not in sums:
        sums[axis] = found
        return
    held = sums[axis]
    held.products += found.products
    held.anchor += found.anchor
    held.client += found.client
    held.rows += found.rows


def _by_role(space: Space, sums: dict[Axis, _Sums]) -> tuple[Tensor, ...]:
    roles: list[Tensor] = []
    for role in range(len(space.group.sizes)):
        nothing = torch.zeros(space.width(role), 1, dtype=torch.float64)
        total = space.group.score(nothing, nothing, role)
        for each in sums.values():
            if each.role == role:
                total = total + each.centred(space)
        roles.append(total)
    return tuple(roles)
