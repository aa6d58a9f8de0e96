"""Rules of operators that act entry by entry, and of those that are the same for every order of the entries."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedbasin.strategies.symmetry.discover.units import Units, fixed
from fedbasin.strategies.symmetry.discover.walk import Call, Rule, Value, Walk, of_value


def broadcast(walk: Walk, call: Call, operands: Sequence[Tensor]) -> list[list[Units]]:
    """Unite the units of tensors that are broadcast against each other, and return those of the result."""
    shape = call.shape
    axes: list[list[Units]] = [[] for _ in shape]
    for uniform in (False, True):
        for tensor in operands:
            value = walk.value(tensor)
            if (value is not None and bool(value.uniform)) is not uniform:
                continue
            offset = len(shape) - tensor.dim()
            for dim, axis in enumerate(walk.axes(tensor)):
                if tensor.shape[dim] == 1 or not shape[offset + dim]:
                    continue
                if not axes[offset + dim]:
                    axes[offset + dim] = axis
                elif not uniform:
                    walk.uniter.unite(axes[offset + dim], axis)
    return axes


def carried(walk: Walk, tensor: Any, dims: int) -> list[int]:
    """Return the axes of a result of `dims` axes along which an operand differs from unit to unit."""
    value = walk.value(tensor)
    if value is None or value.uniform:
        return []
    return [dims - tensor.dim() + dim for dim, n in enumerate(tensor.shape) if n > 1]


def addition(walk: Walk, call: Call) -> Value:
    """Follow a sum, in which all terms change their sign alike."""
    terms = call.args[1:3] if call.name == "where" else call.args[:2]
    operands = [term for term in terms if isinstance(term, Tensor)]
    condition = call.args[:1] if call.name == "where" else ()
    axes = broadcast(walk, call, [*operands, *condition])
    for tensor in condition:
        walk.bend(axes[dim] for dim in carried(walk, tensor, len(axes)))
    if all((value := walk.value(tensor)) is not None and value.uniform for tensor in operands):
        return walk.new(axes, uniform="equal")
    charge = walk.signs.new()
    for term in terms:
        dims = carried(walk, term, len(axes))
        walk.signs.add((axes[dim] for dim in dims), charge, walk.charge(term) if dims else 0)
        value = walk.value(term)
        if not (value is not None and value.uniform == "zero"):
            # A term that is the same for all units forbids signs.
            walk.even((axis for dim, axis in enumerate(axes) if dim not in dims), charge)
    return walk.new(axes, charge)


def multiplied(walk: Walk, call: Call) -> Value:
    """Follow a product or quotient."""
    left, right = call.args[:2]
    if left is right:
        return squared(walk, call)
    operands = [factor for factor in (left, right) if isinstance(factor, Tensor)]
    axes = broadcast(walk, call, operands)
    values = [walk.value(tensor) for tensor in operands]
    if len(operands) == 1 or all(value is None or value.uniform for value in values):
        reference = next(value for value in values if value is not None)
        bent = any(value is not None and value.uniform == "noise" for value in values)
        if bent and len(operands) > 1:
            walk.bend(axes)
        return walk.new(axes, reference.charge, uniform=reference.uniform, square=reference.square)
    charge = walk.signs.new()
    sides = [set(carried(walk, tensor, len(axes))) for tensor in operands]
    both = sides[0] & sides[1]
    walk.bend(axes[dim] for dim in both)
    if call.name == "div" and isinstance(right, Tensor):
        walk.bend(axes[dim] for dim in sides[-1])
    if any(value is not None and value.uniform == "noise" for value in values):
        walk.bend(axes)
    for tensor, side in zip(operands, sides, strict=True):
        walk.signs.add((axes[dim] for dim in side - both), charge, walk.charge(tensor))
    walk.signs.add((axes[dim] for dim in both), charge, *(walk.charge(tensor) for tensor in operands))
    return walk.new(axes, charge)


def squared(walk: Walk, call: Call) -> Value:
    """Follow a square, whose sum a rotation keeps."""
    return walk.unsigned(walk.knowledge(call.args[0]).axes, square=True)


def powered(walk: Walk, call: Call) -> Value:
    """Follow a power."""
    if len(call.args) > 1 and call.args[1] == 2:
        return squared(walk, call)
    return curved(walk, call)


def copied(walk: Walk, call: Call) -> Value:
    """Follow a copy into a tensor."""
    source = call.args[1]
    axes = broadcast(walk, call, [source])
    charge = walk.charge(source)
    dims = carried(walk, source, len(axes))
    walk.even((axis for dim, axis in enumerate(axes) if dim not in dims), charge)
    value = walk.value(source)
    return walk.new(axes, charge, uniform="" if value is None else value.uniform)


def unary_copy(walk: Walk, call: Call) -> Value | None:
    """Follow a copy, a cast or a change of sign of all entries."""
    return walk.value(call.args[0])


@of_value
def odd(walk: Walk, _call: Call, value: Value) -> Value:
    """Follow an odd function, with which signs commute."""
    walk.bend(value.axes)
    return value


@of_value
def even(walk: Walk, _call: Call, value: Value) -> Value:
    """Follow an even function, which forgets signs."""
    walk.bend(value.axes)
    return walk.unsigned(value.axes)


def curved(walk: Walk, call: Call) -> Value:
    """Follow any function of entries, or of tensors entry by entry, that is neither odd nor even."""
    operands = [a for a in call.args if isinstance(a, Tensor)]
    axes = broadcast(walk, call, operands)
    for tensor in operands:
        value = walk.value(tensor)
        if value is not None:
            walk.even(value.axes, value.charge)
            if value.indexes is not None:
                walk.fix([value.indexes])
    walk.bend(axes)
    return walk.unsigned(axes)


def clamped(walk: Walk, call: Call) -> Value | None:
    """Follow a clamp, which is odd if its bounds are symmetric."""
    low, high = call.arg(1), call.arg(2)
    symmetric = isinstance(low, int | float) and isinstance(high, int | float) and low == -high
    return odd(walk, call) if symmetric else curved(walk, call)


def noisy(walk: Walk, call: Call) -> Any:
    """Follow dropout, whose mask is drawn for every entry."""
    value = walk.knowledge(call.args[0])
    walk.bend(value.axes)
    return [value, walk.new(value.axes, uniform="noise")]


def random_numbers(walk: Walk, call: Call) -> Value:
    """Follow random numbers that take the shape of a tensor."""
    return walk.new(walk.axes(call.args[0]), uniform="noise")


@of_value
def reduced(walk: Walk, call: Call, value: Value) -> Any:
    """Follow a reduction, whose result is the same for every order of the entries along the reduced axes."""
    dims, keep = _reduced_dims(call, len(value.axes))
    gone = [value.axes[dim] for dim in dims]
    rest = [axis for dim, axis in enumerate(value.axes) if dim not in dims]
    axes = [[] if dim in dims else axis for dim, axis in enumerate(value.axes)] if keep else rest
    sums = call.name in ("sum", "mean") and not value.indexes
    is_norm = call.name == "linalg_vector_norm" and call.arg(1, 2) == 2
    spreads = call.name in ("var", "var_mean", "std", "std_mean")
    if spreads or (sums and not value.square):
        walk.average(gone)
    if not sums:
        walk.bend(rest if spreads or is_norm else value.axes)
    if not is_norm:
        walk.even(gone if sums else value.axes, value.charge)
    result = walk.new(axes, value.charge, square=value.square) if sums else walk.unsigned(axes)
    return [result] * (1 if isinstance(call.out, Tensor) else len(call.out))


def _reduced_dims(call: Call, count: int) -> tuple[set[int], bool]:
    place = 2 if call.name == "linalg_vector_norm" else 1
    dims = call.arg(place, call.kwargs.get("dim"))
    # `max(x, y)` has a tensor here, and whole reductions have no axis.
    if isinstance(dims, int):
        dims = [dims]
    shape = call.shape
    chosen = {dim % count for dim in dims} if dims else set(range(count))
    return chosen, len(shape) == count and count > 0


@of_value
def extreme(walk: Walk, call: Call, value: Value) -> Any:
    """Follow a maximum or minimum along one axis, whose places are indices of units."""
    if len(call.args) < 2 and call.name in ("max", "min"):
        return reduced(walk, call)
    count = call.args[0].dim()
    dims, keep = _reduced_dims(call, count)
    walk.bend(value.axes)
    walk.even(value.axes, value.charge)
    axes = [[] if dim in dims else axis for dim, axis in enumerate(value.axes) if keep or dim not in dims]
    (dim, *rest) = sorted(dims)
    numbered = value.axes[dim]
    places = _places(walk, numbered, axes) if not rest else walk.new(axes)
    if rest:
        for place in dims:
            walk.fix(value.axes[place])
    if call.name in ("argmax", "argmin"):
        return places
    return [walk.new(axes), places]


@of_value
def ranked(walk: Walk, call: Call, value: Value) -> Any:
    """Follow a choice of the largest entries along an axis, or a sort of them."""
    dim = call.arg(2, call.kwargs.get("dim", -1)) if call.name == "topk" else call.arg(1, call.kwargs.get("dim", -1))
    dim %= len(value.axes)
    walk.bend(value.axes)
    walk.even(value.axes, value.charge)
    shape = call.shape
    if value.indexes is not None:
        walk.fix([value.indexes])
    axes = [fixed(shape[place]) if place == dim else axis for place, axis in enumerate(value.axes)]
    places = _places(walk, value.axes[dim], axes)
    if call.name == "argsort":
        return places
    return [walk.new(axes), places]


def _places(walk: Walk, numbered: list[Units], axes: list[list[Units]]) -> Value:
    if len(numbered) == 1:
        return walk.new(axes, indexes=numbered[0])
    walk.fix(numbered)
    return walk.new(axes)


_COPIES = ("_to_copy", "alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy", "neg", "positive")
_ODD = ("asinh", "atan", "erf", "sin", "sinh", "tan", "tanh")
_EVEN = ("abs", "cos", "cosh")
_CURVED = (
    *("acos", "acosh", "asin", "bitwise_and", "bitwise_not", "bitwise_or", "celu", "ceil", "clamp_max", "clamp_min"),
    *("elu", "eq", "exp", "exp2", "expm1", "floor", "floor_divide", "fmod", "ge", "gelu", "gt", "hardsigmoid"),
    *("hardswish", "isfinite", "isinf", "isnan", "le", "leaky_relu", "log", "log10", "log1p", "log2", "log_sigmoid"),
    *("log_sigmoid_forward", "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "maximum", "minimum"),
    *("mish", "nan_to_num", "ne", "_prelu_kernel", "prelu", "selu", "reciprocal", "relu", "relu6", "remainder"),
    *("round", "rsqrt", "sigmoid", "sign"),
    *("silu", "softplus", "softshrink", "hardshrink", "special_expm1", "sqrt", "threshold", "trunc", "xlogy"),
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_COPIES, unary_copy),
    **dict.fromkeys(_ODD, odd),
    **dict.fromkeys(_EVEN, even),
    **dict.fromkeys(_CURVED, curved),
    **dict.fromkeys(("add", "sub", "rsub", "where"), addition),
    **dict.fromkeys(("mul", "div"), multiplied),
    **dict.fromkeys(("clamp", "hardtanh"), clamped),
    **dict.fromkeys(("sum", "mean", "var", "var_mean", "std", "std_mean", "linalg_vector_norm"), reduced),
    **dict.fromkeys(("amax", "amin", "all", "any", "prod"), reduced),
    **dict.fromkeys(("max", "min", "argmax", "argmin"), extreme),
    **dict.fromkeys(("topk", "sort", "argsort"), ranked),
    **dict.fromkeys(("bernoulli", "normal", "uniform", "rand_like", "randn_like"), random_numbers),
    "copy": copied,
    "native_dropout": noisy,
    "pow": powered,
    "square": squared,
}
