"""Rules of matrix products and convolutions, and of what is composed of other operators."""

import torch
from torch import Tensor

from fedbasin.strategies.symmetry.discover.units import Axis, Units, fixed, leaves
from fedbasin.strategies.symmetry.discover.walk import Call, Rule, Value, Walk


def contract(walk: Walk, left: Tensor, right: Tensor) -> Value:
    """Follow a product of matrices, or of two batches of them, with the units that both sum over united."""
    a, b = walk.axes(left), walk.axes(right)
    batch = left.dim() - 2
    _unite_summed(walk, left, right, a[-1], b[-2 if right.dim() > 1 else -1])
    for outer, rival in zip(a[:batch], b[:batch], strict=True):
        walk.uniter.unite(outer, rival)
        walk.bend([outer])
        for leaf in leaves(outer):
            leaf.outer = True
    charge, left_charge, right_charge = walk.signs.new(), walk.charge(left), walk.charge(right)
    if batch:
        walk.record.batched |= {left_charge, right_charge}
    walk.signs.add([a[-1]], left_charge, right_charge)
    walk.signs.add(a[:batch], charge, left_charge, right_charge)
    rows, columns = a[batch:-1], b[batch + 1 :] if right.dim() > 1 else []
    walk.signs.add(rows, charge, left_charge)
    walk.signs.add(columns, charge, right_charge)
    return walk.new([*a[:batch], *rows, *columns], charge)


def _unite_summed(walk: Walk, left: Tensor, right: Tensor, a: list[Units], b: list[Units]) -> None:
    # What is multiplied with a constant or an input keeps its places by nature.
    reason = ("", "") if walk.value(left) is None or walk.value(right) is None else None
    if reason is not None:
        walk.fix(a, reason)
        walk.fix(b, reason)
    walk.uniter.unite(a, b)


def product(walk: Walk, call: Call) -> Value:
    """Follow `mm`, `bmm` and `mv`."""
    return contract(walk, *call.args[:2])


def dotted(walk: Walk, call: Call) -> Value | None:
    """Follow a product of two vectors as one of matrices."""
    with walk:
        return walk.value(torch.mm(call.args[0][None], call.args[1][:, None]).squeeze())


def convolved(walk: Walk, call: Call) -> Value | None:
    """Follow a convolution, forward or transposed, of any number of groups."""
    tensor, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    spatial = weight.dim() - 2
    if bias is not None:
        with walk:
            unbiased = torch.convolution(tensor, weight, None, *call.args[3:])
            return walk.value(unbiased + bias.view(-1, *(1,) * spatial))
    x, w = list(walk.axes(tensor)), list(walk.axes(weight))
    for axis in x[-spatial:]:
        walk.fix(axis)
    for axis in w[2:]:
        walk.fix(axis, ("", ""))
    channels = x[-spatial - 1]
    written, read = (w[1], w[0]) if transposed else (w[0], w[1])
    if groups == 1:
        _unite_summed(walk, tensor, weight, channels, read)
    else:
        written = _unite_groups(walk, call, channels, read, written)
    charge, features, filters = walk.signs.new(), walk.charge(tensor), walk.charge(weight)
    walk.signs.add([read], features, filters)
    if groups == 1:
        walk.signs.add([written], charge, filters)
    else:
        walk.signs.add([written[:1]], charge, features, filters)
        walk.signs.add([written[1:]], charge, filters)
    batch = x[: -spatial - 1]
    walk.signs.add(batch, charge, features)
    return walk.new([*batch, written, *map(fixed, call.shape[-spatial:])], charge)


def _unite_groups(walk: Walk, call: Call, channels: Axis, read: Axis, written: Axis) -> list[Units]:
    """Unite channels with the weight of a convolution of several groups, and return the channels that it writes."""
    tensor, weight = call.args[:2]
    transposed, groups = call.args[6], call.args[8]
    outer, inner = walk.uniter.split(channels, (groups, tensor.shape[1] // groups))
    if transposed:
        outer_weight, inner_weight = walk.uniter.split(read, (groups, tensor.shape[1] // groups))
        walk.uniter.unite([*outer, *inner], [*outer_weight, *inner_weight])
        return [*outer, *written]
    outer_weight, columns = walk.uniter.split(written, (groups, weight.shape[0] // groups))
    walk.uniter.unite(outer, outer_weight)
    walk.uniter.unite(inner, read)
    walk.bend([outer])
    for leaf in leaves(outer):
        leaf.outer = True
    return [*outer, *columns]


def group_normed(walk: Walk, call: Call) -> list[Value | None]:
    """Follow a normalisation over groups of channels, inside which channels may change places."""
    tensor, weight, bias, *_, groups, epsilon = call.args
    with walk:
        grouped = tensor.unflatten(1, (groups, -1))
        variance, mean = torch.var_mean(grouped, tuple(range(2, grouped.dim())), keepdim=True)
        normed = ((grouped - mean) / (variance + epsilon).sqrt()).flatten(1, 2)
        for function, operand in ((torch.mul, weight), (torch.add, bias)):
            normed = normed if operand is None else function(normed, operand.view(-1, *(1,) * (tensor.dim() - 2)))
    return [walk.value(normed)]


def trilinear(walk: Walk, call: Call) -> Value | None:
    """Follow the product and sum of three tensors, which a bilinear layer is made of."""
    with walk:
        factors = list(call.args[:3])
        for number, dims in enumerate(call.args[3:6]):
            for dim in dims:
                factors[number] = factors[number].unsqueeze(dim)
        return walk.value((factors[0] * factors[1] * factors[2]).sum(call.args[6]))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm", "mv"), product),
    **dict.fromkeys(("dot", "vdot"), dotted),
    "convolution": convolved,
    "native_group_norm": group_normed,
    "_trilinear": trilinear,
}
