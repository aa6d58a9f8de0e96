"""Low-rank adapters: the inner space of each, and how they follow the layers that they adapt.

    W + s B A = W + s (B T^-1)(T A)        A [r, in], B [out, r], T in GL(r)

A client that trains adapters alone moves in the inner spaces only: averaging A and B of clients that have turned apart
is no average of their products (Hu et al. 2022, arXiv 2106.09685; the rotation that aligns them is FedRot-LoRA's,
2026). Where the base moves too, B is written with the layer's outputs and A is read with its inputs. Names are those
of the `peft` library, which need not be installed.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from fedbasin.strategies.symmetry.groups.general_linear import General
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError
from fedbasin.strategies.symmetry.translation import Shift
from fedbasin.strategies.tensors.state import State

_INNER = re.compile(r"(?P<layer>.+)\.lora_(?P<table>embedding_)?A(?P<rest>\..+)?")
_ADDED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
_PREFIX = "base_model.model."


def general(rank: int) -> Wreath:
    """All of GL(rank), for a matching that also stretches; `Orthogonal` rotates only."""
    return Wreath((General(rank),), 1)


def adapters(state: State, group: Callable[[int], Group] = Orthogonal) -> Symmetry:
    """The inner spaces of a model's adapters, one space each.

    Args:
        state: of the adapted model, or of its adapters alone; only names and shapes are read.
        group: what acts on a space of a rank: `Orthogonal`, or `general`.

    Raises:
        SymmetryError: there are no adapters, or a factor lacks its partner.
    """
    found = [_inner_space(state, name, group) for name in state if _INNER.fullmatch(name)]
    if not found:
        raise SymmetryError("the state has no tensor named lora_A; give an adapted model's")
    return Symmetry(tuple(found))


def adapted(symmetry: Symmetry, state: State, *, fan_in_fan_out: bool = False) -> Symmetry:
    """A model's symmetry under the names that adapting has given its tensors, with the adapters following.

    Args:
        symmetry: of the model without adapters.
        state: of the adapted model, with its base.
        fan_in_fan_out: as in the adapters' config: adapted weights are stored `[in, out]`, as in GPT-2.

    Raises:
        SymmetryError: the symmetry folds norms, or an adapter's part cannot follow its layer.
    """
    if symmetry.folds:
        raise SymmetryError("a norm cannot be folded into factors; give a symmetry without folds")
    names = _renamed(state)
    spaces = tuple(_following(space, names, state, fan_in_fan_out) for space in symmetry.spaces)
    shifts = tuple(
        found for shift in symmetry.shifts for found in _renamed_shift(shift, names, state)
    )
    return Symmetry((*spaces, *adapters(state).spaces), shifts=shifts)


def _inner_space(state: State, name: str, group: Callable[[int], Group]) -> Space:
    partner = _partner(name)
    if partner not in state:
        raise SymmetryError(f"{name!r} has no partner {partner!r}; both factors move together")
    found = group(state[name].shape[0])
    return Space(
        name.removeprefix(_PREFIX).replace(".lora_A", "").removesuffix(".weight"),
        found,
        (Axis(name, 0), Axis(partner, 1, role=len(found.sizes) - 1)),
    )


def _partner(name: str) -> str:
    return name.replace(".lora_A", ".lora_B").replace("lora_embedding_A", "lora_embedding_B")


def _renamed(state: State) -> Mapping[str, list[str]]:
    """For each tensor of the model its names in the adapted one; a module that is saved whole has two."""
    result: dict[str, list[str]] = {}
    for name in state:
        if ".lora_" not in name:
            result.setdefault(_ADDED.sub("", name.removeprefix(_PREFIX)), []).append(name)
    return result


def _renamed_shift(shift: Shift, names: Mapping[str, list[str]], state: State) -> Iterator[Shift]:
    """The shift, unless its projection is adapted and so is no single tensor any more."""
    (bias,) = names.get(shift.bias, [shift.bias])
    if shift.output is None:
        yield replace(shift, bias=bias)
    elif shift.output.weight in state or f"{_PREFIX}{shift.output.weight}" in state:
        weight, output = (names[name][0] for name in (shift.output.weight, shift.output.bias))
        yield replace(shift, bias=bias, output=replace(shift.output, weight=weight, bias=output))


def _following(
    space: Space, names: Mapping[str, list[str]], state: State, transposed: bool
) -> Space:
    axes = tuple(
        follower
        for axis in space.axes
        for name in names.get(axis.tensor, [axis.tensor])
        for follower in (
            replace(axis, tensor=name),
            *_factors(space, axis, name, state, transposed),
        )
    )
    return replace(space, axes=axes)


def _factors(space: Space, axis: Axis, name: str, state: State, transposed: bool) -> Iterator[Axis]:
    """The factors of a layer's adapters that have the axis's axis."""
    layer = name.removesuffix(".base_layer.weight")
    for factor in state if layer != name else ():
        match = _INNER.fullmatch(factor)
        if match and match["layer"] == layer:
            reading = 0 if transposed or match["table"] else 1
            reads = axis.dim == reading
            yield replace(axis, tensor=factor if reads else _partner(factor), dim=int(reads))
        elif factor.startswith(f"{layer}.lora_magnitude_vector.") and axis.dim == 0:
            yield _magnitude(space, axis, factor)


def _magnitude(space: Space, axis: Axis, name: str) -> Axis:
    if not isinstance(space.group, Permutation):
        raise SymmetryError(
            f"{name!r} scales outputs one by one, which {space.group} at space {space.name!r} mixes; "
            "leave the space out, or adapt without magnitudes"
        )
    return replace(axis, tensor=name)
