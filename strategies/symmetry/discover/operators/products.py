"""Rules of matrix products, convolutions and normalisations."""

from collections.abc import Iterable
from typing import Any

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


def dotted(walk: Walk, call: Call) -> Value:
    """Follow a product of two vectors."""
    left, right = call.args[:2]
    a, b = walk.axes(left), walk.axes(right)
    _unite_summed(walk, left, right, a[0], b[0])
    walk.signs.add(a, walk.charge(left), walk.charge(right))
    return walk.new([])


def added_product(walk: Walk, call: Call) -> Value:
    """Follow `addmm` and its relatives: a product to which a bias is added."""
    bias, left, right = call.args[:3]
    result = contract(walk, left, right)
    if call.kwargs.get("beta", 1) == 0:
        return result
    return add_bias(walk, result, bias, range(len(result.axes)))


def add_bias(walk: Walk, result: Value, bias: Tensor, dims: Iterable[int]) -> Value:
    """Note that a bias with the given axes of a result is added to it."""
    places = list(dims)[-bias.dim() :] if bias.dim() else []
    axes = walk.axes(bias)
    differing = [(dim, axis) for dim, axis, n in zip(places, axes, bias.shape, strict=True) if n > 1]
    for dim, axis in differing:
        walk.uniter.unite(result.axes[dim], axis)
    walk.signs.add([axis for _, axis in differing], result.charge, walk.charge(bias))
    constant = set(range(len(result.axes))) - {dim for dim, _ in differing}
    value = walk.value(bias)
    # What is the same for all units forbids signs, unless it is the batch.
    if value is None or value.uniform != "zero":
        walk.even([result.axes[dim] for dim in constant], result.charge)
    return result


def scale(walk: Walk, axes: list[list[Units]], charge: int, weight: Tensor | None, dims: list[int]) -> int:
    """Note that entries are multiplied by a weight with the given axes; return the charge of the product."""
    if weight is None:
        return charge
    for dim, axis in zip(dims, walk.axes(weight), strict=True):
        walk.uniter.unite(axes[dim], axis)
    walk.bend(axes[dim] for dim in dims)
    scaled = walk.signs.new()
    walk.signs.add([axes[dim] for dim in dims], scaled, charge, walk.charge(weight))
    walk.signs.add([axis for dim, axis in enumerate(axes) if dim not in dims], scaled, charge)
    return scaled


def convolved(walk: Walk, call: Call) -> Value:
    """Follow a convolution, forward or transposed, of any number of groups."""
    tensor, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    spatial = weight.dim() - 2
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
    result = walk.new([*batch, written, *map(fixed, call.shape[-spatial:])], charge)
    return result if bias is None else add_bias(walk, result, bias, [len(batch)])


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


def layer_normed(walk: Walk, call: Call) -> Any:
    """Follow a layer normalisation or a root mean square normalisation over the last axes."""
    tensor, lengths, weight = call.args[:3]
    bias = call.arg(3) if call.name == "native_layer_norm" else None
    axes = list(walk.axes(tensor))
    dims = list(range(len(axes) - len(lengths), len(axes)))
    charge = walk.charge(tensor)
    if call.name == "native_layer_norm":
        walk.average(axes[dim] for dim in dims)
        walk.even((axes[dim] for dim in dims), charge)
    result = walk.new(axes, scale(walk, axes, charge, weight, dims))
    if bias is not None:
        add_bias(walk, result, bias, dims)
    rest = [walk.new([[] if dim in dims else axis for dim, axis in enumerate(axes)]) for _ in range(2)]
    return [result, *rest] if isinstance(call.out, tuple) else result


def group_normed(walk: Walk, call: Call) -> Any:
    """Follow a normalisation over groups of channels, inside which channels may change places."""
    tensor, weight, bias = call.args[:3]
    groups = call.args[6]
    axes = list(walk.axes(tensor))
    if tensor.shape[1] > 1:
        outer, inner = walk.uniter.split(axes[1], (groups, tensor.shape[1] // groups))
        axes[1] = [*outer, *inner]
        walk.bend([outer])
        walk.average([inner])
        for leaf in leaves(outer):
            leaf.outer = True
    for axis in axes[2:]:
        walk.fix(axis)
    walk.even(axes, walk.charge(tensor))
    charge = walk.signs.new()
    walk.even(axes[2:], charge)
    walk.signs.add([axes[1]], charge)
    result = walk.new(axes, scale(walk, axes, charge, weight, [1]))
    if bias is not None:
        add_bias(walk, result, bias, [1])
    return [result, walk.new([axes[0], fixed(groups)]), walk.new([axes[0], fixed(groups)])]


def batch_normed(walk: Walk, call: Call) -> Any:
    """Follow a batch normalisation, channel by channel."""
    tensor, weight, bias, mean, variance = call.args[:5]
    axes = list(walk.axes(tensor))
    charge = walk.charge(tensor)
    walk.bend([axes[1]])
    for statistic in (mean, variance):
        if statistic is not None:
            walk.uniter.unite(axes[1], walk.axes(statistic)[0])
            walk.bend([axes[1]])
    if mean is not None and walk.value(mean) is not None:
        walk.signs.add([axes[1]], charge, walk.charge(mean))
    elif mean is not None:
        walk.even([axes[1]], charge)
    if variance is not None:
        walk.even([axes[1]], walk.charge(variance))
    result = walk.new(axes, scale(walk, axes, charge, weight, [1]))
    if bias is not None:
        add_bias(walk, result, bias, [1])
    outs = len(call.out) if isinstance(call.out, tuple) else 1
    return [result, *(walk.new([list(axes[1])] * (call.out[n].dim())) for n in range(1, outs))]


def weight_normed(walk: Walk, call: Call) -> Any:
    """Follow a weight normalisation: matrices of norm 1 along all axes but one, times a gain along that."""
    direction, gain = call.args[:2]
    dim = call.arg(2, 0) % direction.dim()
    axes = list(walk.axes(direction))
    walk.uniter.unite(axes[dim], walk.axes(gain)[dim])
    walk.bend([axes[dim]])
    charge = walk.signs.new()
    walk.signs.add([axes[dim]], charge, walk.charge(direction), walk.charge(gain))
    walk.signs.add(axes[:dim] + axes[dim + 1 :], charge, walk.charge(direction))
    return [walk.new(axes, charge), walk.new([[] if n != dim else axes[dim] for n in range(len(axes))])]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm", "mv"), product),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), added_product),
    **dict.fromkeys(("dot", "vdot"), dotted),
    "_weight_norm_interface": weight_normed,
    "convolution": convolved,
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), layer_normed),
    "native_group_norm": group_normed,
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"), batch_normed
    ),
    "_batch_norm_with_update": batch_normed,
}
