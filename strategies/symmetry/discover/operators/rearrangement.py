"""Rules of operators that rearrange entries: views, cuts, concatenations and copies along axes."""

import math
from collections.abc import Sequence

from torch import Tensor

from fedbasin.strategies.symmetry.discover.units import Units, beside, concatenation, fixed, fresh, length
from fedbasin.strategies.symmetry.discover.walk import Call, Rule, Value, Walk, of_value, stop


def with_axes(walk: Walk, value: Value, axes: list[list[Units]], charge: int | None = None) -> Value:
    """Return a value with other axes, of which all else that is known stays."""
    charge = value.charge if charge is None else charge
    return walk.new(axes, charge, uniform=value.uniform, indexes=value.indexes, square=value.square)


@of_value
def reshaped(walk: Walk, call: Call, value: Value) -> Value:
    """Follow a reshape, group by group of the axes that are merged and divided."""
    if not math.prod(call.shape):
        return stop(walk, call)[0]
    return with_axes(walk, value, reshape(walk, value.axes, call.shape))


def reshape(walk: Walk, axes: list[list[Units]], shape: Sequence[int]) -> list[list[Units]]:
    """Return the axes after a reshape."""
    result: list[list[Units]] = []
    place = 0
    queue = list(shape)
    while place < len(axes) or queue:
        merged: list[Units] = []
        lengths: list[int] = []
        # The shortest runs of old and new axes with equal numbers of entries.
        while True:
            if math.prod(lengths) <= length(merged) and queue and (not lengths or math.prod(lengths) < length(merged)):
                lengths.append(queue.pop(0))
            elif place < len(axes) and (length(merged) < math.prod(lengths) or not lengths):
                merged += axes[place]
                place += 1
            else:
                break
            if lengths and math.prod(lengths) == length(merged):
                break
        result += walk.uniter.split(merged, lengths) if lengths else []
    return result


@of_value
def permuted(walk: Walk, call: Call, value: Value) -> Value:
    """Follow an exchange of axes."""
    axes = value.axes
    count = len(axes)
    if call.name == "permute":
        return with_axes(walk, value, [axes[dim] for dim in call.args[1]])
    left, right = (call.args[1] % count, call.args[2] % count) if call.name == "transpose" else (0, count - 1)
    order = list(range(count))
    if count > 1:
        order[left], order[right] = order[right], order[left]
    return with_axes(walk, value, [axes[dim] for dim in order])


@of_value
def unsqueezed(walk: Walk, call: Call, value: Value) -> Value:
    """Follow an axis of length 1 that is added."""
    dim = call.args[1] % (len(value.axes) + 1)
    return with_axes(walk, value, [*value.axes[:dim], [], *value.axes[dim:]])


@of_value
def squeezed(walk: Walk, call: Call, value: Value) -> Value:
    """Follow axes of length 1 that are left out."""
    tensor, axes = call.args[0], value.axes
    dims = call.arg(1, list(range(len(axes))))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {dim % max(len(axes), 1) for dim in dims}
    return with_axes(walk, value, [a for dim, a in enumerate(axes) if not (dim in gone and tensor.shape[dim] == 1)])


@of_value
def expanded(walk: Walk, call: Call, value: Value) -> Value:
    """Follow axes along which entries are repeated; what is repeated may change places."""
    shape = call.shape
    axes: list[list[Units]] = [[]] * (len(shape) - len(value.axes)) + value.axes
    return with_axes(walk, value, [a if length(a) == n else fresh(n) for a, n in zip(axes, shape, strict=True)])


@of_value
def selected(walk: Walk, call: Call, value: Value) -> Value:
    """Follow one slice along an axis."""
    dim = call.args[1] % len(value.axes)
    pieces = places_along(walk, value, dim)
    if pieces is not None:
        return pieces[call.args[2] % len(pieces)]
    result = with_axes(walk, value, beside(value.axes, dim))
    if not value.uniform:
        # Models read one entry for its shape alone, too.
        result.unused.append((value.axes[dim], (walk.operation, walk.source())))
    return result


def places_along(walk: Walk, value: Value, dim: int) -> list[Value] | None:
    """Return the slices of a stack along an axis, or None if the axis is not that of a stack."""
    pieces = None if value.uniform else walk.uniter.unstack(value.axes, dim)
    if pieces is None:
        return None
    rest = beside(value.axes, dim)
    result: list[Value] = []
    predecessors: list[list[Units]] = [[] for _ in rest]
    for axes in pieces:
        charge = walk.signs.new()
        for axis, stacked, ahead in zip(axes, rest, predecessors, strict=True):
            if axis == [units.root() for units in stacked]:
                walk.signs.add([axis], charge, value.charge)
            else:
                walk.signs.add_part(axis, ahead, value.charge, charge)
        predecessors = [[*ahead, *axis] for ahead, axis in zip(predecessors, axes, strict=True)]
        result.append(walk.new(axes, charge))
    return result


@of_value
def sliced(walk: Walk, call: Call, value: Value) -> Value | None:
    """Follow a slice; one with a step keeps every entry with the same remainder."""
    dim = call.arg(1, 0) % len(value.axes)
    total = call.args[0].shape[dim]
    start, stop_at, step = slice(call.arg(2), call.arg(3), call.arg(4, 1)).indices(total)
    axes = list(value.axes)
    if stop_at <= start:
        return None
    if step == 1:
        sizes = [size for size in (start, stop_at - start, total - stop_at) if size]
        return parts_of(walk, value, dim, sizes)[start > 0]
    if total % step == 0 and stop_at > total - step + start % step:
        axes[dim], inner = walk.uniter.split(axes[dim], (total // step, step))
        walk.fix(inner)
    else:
        walk.fix(axes[dim])
        axes[dim] = fixed(call.shape[dim])
    return with_axes(walk, value, axes)


def parts_of(walk: Walk, value: Value, dim: int, sizes: Sequence[int]) -> list[Value]:
    """Return consecutive parts of a value, whose charges along the axis that is cut are those of the part."""
    if len(sizes) == 1:
        return [value]
    preceding: list[Units] = []
    parts = []
    for axes in walk.uniter.cut_along(value.axes, dim, sizes):
        part = axes[dim]
        charge = walk.signs.new()
        walk.signs.add(beside(axes, dim), charge, value.charge)
        walk.signs.add_part(part, preceding, value.charge, charge)
        parts.append(with_axes(walk, value, axes, charge))
        preceding = [*preceding, *part]
    return parts


@of_value
def divided(walk: Walk, call: Call, value: Value) -> list[Value]:
    """Follow a split into several tensors."""
    dim = call.arg(2, call.kwargs.get("dim", 0)) % len(value.axes)
    return parts_of(walk, value, dim, [out.shape[dim] for out in call.out])


@of_value
def unbound(walk: Walk, call: Call, value: Value) -> list[Value]:
    """Follow a split into the slices along an axis."""
    dim = call.arg(1, 0) % len(value.axes)
    pieces = places_along(walk, value, dim)
    if pieces is not None:
        return pieces
    if not value.uniform:
        walk.fix(value.axes[dim])
    return [walk.new(beside(value.axes, dim), value.charge, uniform=value.uniform) for _ in call.out]


def concatenated(walk: Walk, call: Call) -> Value:
    """Follow a concatenation along an axis."""
    tensors = [t for t in call.args[0] if t.numel()]
    count = len(call.shape)
    dim = call.arg(1, call.kwargs.get("dim", 0)) % count
    values = [walk.value(t) for t in tensors]
    lists = [walk.axes(t) for t in tensors]
    for place in set(range(count)) - {dim}:
        for axes in lists[1:]:
            walk.uniter.unite(lists[0][place], axes[place])
    joined = concatenation([axes[dim] for axes in lists])
    result = [*lists[0][:dim], joined, *lists[0][dim + 1 :]]
    charge = walk.signs.new()
    preceding: list[Units] = []
    for axes, value in zip(lists, values, strict=True):
        if value is None:
            walk.even(beside(result, dim), charge)
        elif value.uniform != "zero":
            walk.signs.add(beside(axes, dim), charge, value.charge)
            walk.signs.add_part(axes[dim], preceding, charge, value.charge)
        if value is not None and value.indexes is not None:
            walk.fix([value.indexes])
        preceding = [*preceding, *axes[dim]]
    uniform = "equal" if all(value is not None and value.uniform for value in values) else ""
    return walk.new(result, charge, uniform=uniform)


@of_value
def padded(walk: Walk, call: Call, value: Value) -> Value:
    """Follow padding, which adds entries at the ends of axes."""
    widths, axes = call.args[1], list(value.axes)
    for number in range(len(widths) // 2):
        dim = len(axes) - 1 - number
        front, back = widths[2 * number : 2 * number + 2]
        if min(front, back) < 0 or call.name != "constant_pad_nd":
            if front or back:
                walk.fix(axes[dim])
                axes[dim] = fixed(call.shape[dim])
        elif front or back:
            ends = [fixed(front)] * (front > 0), [fixed(back)] * (back > 0)
            axes[dim] = concatenation([*ends[0], axes[dim], *ends[1]])
    if call.arg(2, 0):
        walk.even(value.axes, value.charge)
        walk.bend(value.axes)
    return with_axes(walk, value, axes)


@of_value
def rolled(walk: Walk, call: Call, value: Value) -> Value | None:
    """Follow an operator that depends on the order along some axes, and on nothing else."""
    place = 2 if call.name == "roll" else 1
    dims = call.arg(place, call.kwargs.get("dim", []))
    dims = [dims] if isinstance(dims, int) else list(dims)
    chosen = {dim % len(value.axes) for dim in dims} if dims else set(range(len(value.axes)))
    for dim in chosen:
        walk.fix(value.axes[dim])
    if call.name not in ("flip", "roll", "cumsum"):
        walk.bend(value.axes)
        walk.even(value.axes, value.charge)
    axes = [fixed(n) if dim in chosen else value.axes[dim] for dim, n in enumerate(call.shape)]
    result = with_axes(walk, value, axes)
    return result if isinstance(call.out, Tensor) else None


def windowed(dims: int) -> Rule:
    """Return the rule of an operator on windows of the last `dims` axes, channel by channel."""

    @of_value
    def rule(walk: Walk, call: Call, value: Value) -> Value:
        for axis in value.axes[-dims:]:
            walk.fix(axis)
        averages = call.name.startswith(("adaptive_avg", "_adaptive_avg", "avg_pool", "upsample_bi", "upsample_n"))
        if not averages and not call.name.startswith(("upsample", "pixel")):
            walk.bend(value.axes)
            walk.even(value.axes, value.charge)
        shape = call.shape
        axes = [*value.axes[:-dims], *map(fixed, shape[-dims:])]
        return walk.new(axes, value.charge)

    return rule


@of_value
def unfolded(walk: Walk, call: Call, value: Value) -> Value:
    """Follow windows along one axis, which become a new last axis."""
    dim = call.args[1] % len(value.axes)
    walk.fix(value.axes[dim])
    axes = list(value.axes)
    axes[dim] = fixed(call.shape[dim])
    return with_axes(walk, value, [*axes, fixed(call.shape[-1])])


@of_value
def complex_viewed(walk: Walk, call: Call, value: Value) -> Value:
    """Follow pairs of entries that become complex numbers, or back."""
    if call.name == "view_as_real":
        return with_axes(walk, value, [*value.axes, fixed(2)])
    walk.fix(value.axes[-1])
    return with_axes(walk, value, value.axes[:-1])


_POOLS = ("avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "max_pool", "adaptive_max_pool")
_SUFFIXES = ("", "_with_indices")

RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), reshaped),
    **dict.fromkeys(("permute", "transpose", "t"), permuted),
    **{f"{pool}{n}d{suffix}": windowed(n) for pool in _POOLS for n in (1, 2, 3) for suffix in _SUFFIXES},
    **{f"upsample_{kind}1d": windowed(1) for kind in ("nearest", "linear", "_nearest_exact")},
    **{f"upsample_{kind}2d": windowed(2) for kind in ("nearest", "bilinear", "bicubic")},
    **{f"_upsample_{kind}": windowed(2) for kind in ("bilinear2d_aa", "bicubic2d_aa", "nearest_exact2d")},
    "unsqueeze": unsqueezed,
    "squeeze": squeezed,
    "expand": expanded,
    "select": selected,
    "slice": sliced,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk"), divided),
    "unbind": unbound,
    "cat": concatenated,
    **dict.fromkeys(
        ("constant_pad_nd", *(f"{k}_pad{n}d" for k in ("reflection", "replication") for n in (1, 2, 3))), padded
    ),
    **dict.fromkeys(("flip", "roll", "cumsum", "cumprod"), rolled),
    "unfold": unfolded,
    **dict.fromkeys(("view_as_complex", "view_as_real"), complex_viewed),
}
