"""How the features of anchor and client correlate on the client's data: one pass, sums alone.

    C = sum over rows of  z^a (z^k)^T  -  (sum z^a)(sum z^k)^T / rows        z the output of a layer that writes a site

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
from fedbasin.strategies.symmetry.symmetry import Member, Site, Symmetry
from fedbasin.strategies.tensors.state import State

Rows = Float[Tensor, "channels rows"]

# The axis of the weight that its outputs are numbered by.
_OUTPUT_AXIS = {nn.Linear: 0, nn.Conv1d: 0, nn.Conv2d: 0, nn.Conv3d: 0, nn.Embedding: 1}


@dataclass
class _Sums:
    """Of one writer of a site: products of features, and features.

    Attributes:
        leg: which of the group's feature spaces it writes.
        products: as the group keeps them.
        anchor, client: sums of the features, `[width, 1]`.
        rows: how many.
    """

    leg: int
    products: Tensor
    anchor: Tensor
    client: Tensor
    rows: int

    def centred(self, site: Site) -> Tensor:
        """The products of deviations from the mean."""
        scale = self.rows**0.5
        return self.products - site.group.score(self.anchor / scale, self.client / scale, self.leg)


def correlations(
    symmetry: Symmetry, model: nn.Module, anchor: State, own: State, batches: Batches
) -> dict[str, tuple[Tensor, ...]]:
    """C of every leg of every site, by site name, in double on the CPU.

    A site is seen where a module of its own writes it: a linear layer, a convolution or an embedding. Sites that none
    writes are left out, as are those that stretch, whose legs need more than products; a leg that none writes, such as
    a norm's gains, is zero.

    Args:
        symmetry: the sites.
        model: lends its architecture; it runs in evaluation mode and is left as it was.
        anchor: the global model.
        own: the client's.
        batches: the client's data, read once.

    Raises:
        ValueError: there is no data, or a state does not fit the model.
    """
    writers = dict(_writers(model))
    bound = [bind(model, state) for state in (anchor, own)]
    sums: dict[str, dict[Member, _Sums]] = {}
    with evaluating(model), layer_by_layer(), torch.no_grad():
        for batch in read(batches, model):
            ours, theirs = (_features(model, writers, batch, state) for state in bound)
            for site in symmetry.sites:
                for member in _seen(site, writers, ours):
                    found = _products(site, member, ours[member.tensor], theirs[member.tensor])
                    _add(sums.setdefault(site.name, {}), member, found)
    return {s.name: _by_leg(s, sums[s.name]) for s in symmetry.sites if s.name in sums}


def _writers(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    """Each weight that writes features, with its module and the axis of its outputs."""
    for name, module in model.named_modules():
        if type(module) in _OUTPUT_AXIS:
            yield f"{name}.weight" if name else "weight", (module, _OUTPUT_AXIS[type(module)])


def _seen(
    site: Site, writers: dict[str, tuple[nn.Module, int]], features: dict[str, Rows]
) -> Iterator[Member]:
    """The members that write the site, with the axis that their features have."""
    element = site.group.identity()
    if any(dual != leg for leg, dual in enumerate(element.duals)):
        return
    for member in site.scored:
        known = member.tensor in features and member.outer is None
        if known and member.axis == writers[member.tensor][1]:
            yield replace(member, axis=0)


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


def _products(site: Site, member: Member, ours: Rows, theirs: Rows) -> _Sums:
    width = site.width(member.leg)
    a, k = (member.rows(each, width) for each in (ours, theirs))
    score = site.group.score(a, k, member.leg)
    return _Sums(member.leg, score.cpu(), a.sum(1, True).cpu(), k.sum(1, True).cpu(), a.shape[1])


def _add(sums: dict[Member, _Sums], member: Member, found: _Sums) -> None:
    if member not in sums:
        sums[member] = found
        return
    held = sums[member]
    held.products += found.products
    held.anchor += found.anchor
    held.client += found.client
    held.rows += found.rows


def _by_leg(site: Site, sums: dict[Member, _Sums]) -> tuple[Tensor, ...]:
    legs: list[Tensor] = []
    for leg in range(len(site.group.sizes)):
        nothing = torch.zeros(site.width(leg), 1, dtype=torch.float64)
        total = site.group.score(nothing, nothing, leg)
        for each in sums.values():
            if each.leg == leg:
                total = total + each.centred(site)
        legs.append(total)
    return tuple(legs)
