"""Rules of operators that read or write entries by their indices, and of those whose result is a decision."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedbasin.strategies.symmetry.discover.operators.rearrangement import sliced
from fedbasin.strategies.symmetry.discover.units import Units, beside, fixed, length
from fedbasin.strategies.symmetry.discover.walk import Call, Rule, Value, Walk, stop
from fedbasin.strategies.symmetry.symmetry import SymmetryError


def _note_reading(walk: Walk, tensor: Tensor, axis: list[Units], places: Tensor) -> None:
    """Note that entries of an axis are chosen by places; their numbers must mean the same afterwards."""
    value = walk.value(places)
    numbered = None if value is None else value.indexes
    if numbered is not None and length(axis) == numbered.size:
        walk.uniter.unite(axis, [numbered])
        for leaf in numbered.leaves():
            # Each entry is read by itself, so what is inside may depend on it.
            leaf.outer = True
        walk.record.batched.add(walk.charge(tensor))
        return
    # A table that is read by tokens or positions keeps its rows by nature.
    is_table = value is None and walk.is_stored(tensor)
    walk.fix(axis, ("", "") if is_table else None)
    if numbered is not None:
        walk.fix([numbered])


def _without_masks(walk: Walk, places: Sequence[Any]) -> list[Any]:
    """Return places with the numbers of entries for a mask over several axes, unless it depends on parameters."""
    result: list[Any] = []
    for place in places:
        is_mask = place is not None and place.dtype == torch.bool and place.dim() > 1 and walk.value(place) is None
        result += place.nonzero(as_tuple=True) if place is not None and is_mask else (place,)
    return result


def indexed(walk: Walk, call: Call) -> Any:
    """Follow indexing by tensors."""
    if (stretch := _stretch(walk, call)) is not None:
        return sliced(walk, stretch)
    tensor, places = call.args[0], _without_masks(walk, call.args[1])
    if any(place is not None and place.dtype == torch.bool and place.dim() != 1 for place in places):
        return stop(walk, call)
    value, axes = walk.value(tensor), list(walk.axes(tensor))
    places += [None] * (len(axes) - len(places))
    dims = [dim for dim, place in enumerate(places) if place is not None]
    for dim in dims:
        _note_reading(walk, tensor, axes[dim], places[dim])
    count = call.out.dim() - (len(axes) - len(dims))
    present = [places[dim] for dim in dims]
    shape = torch.broadcast_shapes(*(p.shape for p in present)) if count == max(p.dim() for p in present) else ()
    if any(place.dtype == torch.bool for place in present):
        for place in present:
            for axis in walk.axes(place):
                walk.fix(axis)
        shape = ()
    inserted = _places_axes(walk, present, count) if shape else []
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    start = dims[0] if adjacent else 0
    rest = [axis for dim, axis in enumerate(axes) if dim not in dims]
    leading = rest[:start] if adjacent else []
    trailing = rest[start:] if adjacent else rest
    if not shape:
        inserted = [fixed(n) for n in call.shape[len(leading) : len(leading) + count]]
    if value is None:
        return walk.new([*leading, *inserted, *trailing])
    return walk.new([*leading, *inserted, *trailing], value.charge, uniform=value.uniform)


def _stretch(walk: Walk, call: Call) -> Call | None:
    """Return the slice that indexing by a list of consecutive numbers amounts to, as in `qkv[..., [-2], :]`."""
    present = [(dim, place) for dim, place in enumerate(call.args[1]) if place is not None]
    if len(present) > 1 or not walk.is_literal(present[0][1]) or present[0][1].dim() != 1:
        return None
    ((dim, place),) = present
    numbers = [number % call.args[0].shape[dim] for number in place.tolist()]
    if place.dtype == torch.bool or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return None
    return replace(call, args=(call.args[0], dim, numbers[0], numbers[0] + len(numbers)))


def _places_axes(walk: Walk, places: Sequence[Tensor], count: int) -> list[list[Units]]:
    """Return the axes to which tensors of places are broadcast, `count` in number."""
    result: list[list[Units]] = [[] for _ in range(count)]
    for place in places:
        for number, axis in enumerate(walk.axes(place)):
            target = count - place.dim() + number
            if place.shape[number] > 1:
                if result[target]:
                    walk.uniter.unite(result[target], axis)
                else:
                    result[target] = axis
    return result


def _unite_beside(walk: Walk, tensor: Tensor, rival: Tensor, dim: int) -> None:
    """Unite the axes of two tensors beside the one along which entries are chosen; those of other lengths are fixed."""
    pairs = zip(walk.axes(tensor), tensor.shape, walk.axes(rival), rival.shape, strict=True)
    for axis, size, other, other_size in beside(list(pairs), dim):
        if size == other_size:
            walk.uniter.unite(axis, other)
        else:
            walk.fix(axis)
            walk.fix(other)


def gathered(walk: Walk, call: Call) -> Value:
    """Follow a choice of entries along an axis, a place for each entry of the result."""
    tensor, dim, places = call.args[:3]
    dim %= max(tensor.dim(), 1)
    _note_reading(walk, tensor, walk.axes(tensor)[dim], places)
    _unite_beside(walk, tensor, places, dim)
    value, result = walk.value(tensor), list(walk.axes(places))
    return walk.new(result) if value is None else walk.new(result, value.charge, uniform=value.uniform)


def scattered(walk: Walk, call: Call) -> Value:
    """Follow a write to places along an axis."""
    tensor, dim, places = call.args[:3]
    source = call.arg(3)
    axes = list(walk.axes(tensor))
    dim %= max(len(axes), 1)
    _note_reading(walk, tensor, axes[dim], places)
    for operand in (places, source) if isinstance(source, Tensor) else (places,):
        if operand.dim() == len(axes):
            _unite_beside(walk, tensor, operand, dim)
    charge = walk.signs.new()
    if isinstance(source, Tensor):
        walk.signs.add(beside(walk.axes(source), dim), charge, walk.charge(source))
    else:
        walk.even(axes, charge)
    return _written(walk, tensor, axes, charge)


def _written(walk: Walk, tensor: Tensor, axes: list[list[Units]], charge: int) -> Value:
    value = walk.value(tensor)
    if value is None:
        walk.even(axes, charge)
    elif value.uniform != "zero":
        walk.signs.add(axes, charge, value.charge)
    return walk.new(axes, charge)


def index_written(walk: Walk, call: Call) -> Any:
    """Follow `index_put`, which writes the values along the axes that are not indexed."""
    tensor, places, source = call.args[0], _without_masks(walk, call.args[1]), call.args[2]
    axes = list(walk.axes(tensor))
    if any(place is not None and place.dtype == torch.bool and place.dim() > 1 for place in places):
        return stop(walk, call)
    dims = [dim for dim, place in enumerate(places) if place is not None]
    for dim in dims:
        _note_reading(walk, tensor, axes[dim], places[dim])
    trailing = [axis for dim, axis in enumerate(axes) if dim > dims[-1]]
    source_axes = walk.axes(source)
    for number in range(1, min(len(trailing), len(source_axes)) + 1):
        if source.shape[-number] == tensor.shape[-number]:
            walk.uniter.unite(trailing[-number], source_axes[-number])
        else:
            walk.even([trailing[-number]], walk.charge(source))
    for axis in source_axes[: max(len(source_axes) - len(trailing), 0)]:
        for units in axis:
            if any(units.root() in [u.root() for u in axes[dim]] for dim in dims):
                continue
            walk.fix([units])
    charge = walk.signs.new()
    walk.signs.add(source_axes, charge, walk.charge(source))
    return _written(walk, tensor, axes, charge)


def index_added(walk: Walk, call: Call) -> Any:
    """Follow `index_add` and `index_copy`."""
    tensor, dim, places, source = call.args[:4]
    axes, source_axes = list(walk.axes(tensor)), walk.axes(source)
    dim %= len(axes)
    _note_reading(walk, tensor, axes[dim], places)
    _unite_beside(walk, tensor, source, dim)
    walk.fix(source_axes[dim])
    charge = walk.signs.new()
    walk.signs.add(beside(source_axes, dim), charge, walk.charge(source))
    return _written(walk, tensor, axes, charge)


def decided(walk: Walk, call: Call) -> Any:
    """Follow a number that leaves the model's tensors, by which it may decide."""
    tensor = call.args[0]
    value = walk.value(tensor)
    depends = value is not None and not value.uniform and value not in walk.record.parameters.values()
    if depends or id(tensor) in walk.driven:
        if tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
            raise SymmetryError(
                f"the model decides by data, at {walk.source()}: a {tensor.dtype} that depends on parameters or inputs "
                "leaves the forward pass, and with other data the model may take another path"
            )
        walk.record.decides = True
    return stop(walk, call)


def located(walk: Walk, call: Call) -> Any:
    """Follow the places of entries that are not zero, whose number depends on data."""
    walk.record.decides = True
    return stop(walk, call)


RULES: dict[str, Rule] = {
    "index": indexed,
    "gather": gathered,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scattered),
    **dict.fromkeys(("index_put", "_index_put_impl"), index_written),
    **dict.fromkeys(("index_add", "index_copy"), index_added),
    **dict.fromkeys(("_local_scalar_dense", "equal", "is_nonzero"), decided),
    **dict.fromkeys(("nonzero", "masked_select", "unique", "_unique2"), located),
}
