"""Low-rank adapters: the inner space of each adapter, and the axes on which adapters follow their layers.

    W + s B A = W + s (B T^-1)(T A)        A [r, in], B [out, r], T in GL(r)

Clients that train adapters alone differ by maps of the inner spaces, and averages of A and of B that are rotated
against each other do not multiply to the average of the products (Hu et al. 2022, arXiv 2106.09685; the rotations
that align them are those of FedRot-LoRA, 2026). If the base model is transformed too, B follows the outputs of its
layer and A the inputs. Names are those of the `peft` library, which need not be installed.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from fedbasin.strategies.symmetry.groups.general_linear import General
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Wreath
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError
from fedbasin.strategies.symmetry.translation import Shift
from fedbasin.strategies.tensors.state import State

_INNER = re.compile(r"(?P<layer>.+)\.lora_(?P<table>embedding_)?A(?P<rest>\..+)?")
_ADDED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
_PREFIX = "base_model.model."


def general(rank: int) -> Wreath:
    """Return GL(rank), for a matching that also stretches; `Orthogonal` only rotates."""
    return Wreath((General(rank),), 1)


def adapters(state: State, group: Callable[[int], Group] = Orthogonal) -> Symmetry:
    """Return the symmetry of a model's adapters, with one space for the inner space of each.

    Args:
        state: state of the adapted model, or of its adapters alone; only names and shapes are read.
        group: function from the rank of an adapter to the group on its inner space: `Orthogonal`, or `general`.

    Raises:
        SymmetryError: there are no adapters, or one factor of an adapter is missing.
    """
    spaces = tuple(_inner_space(state, name, group) for name in state if _INNER.fullmatch(name))
    if not spaces:
        raise SymmetryError("the state has no tensor named lora_A; give the state of an adapted model")
    return Symmetry(spaces)


def adapted(symmetry: Symmetry, state: State, *, fan_in_fan_out: bool = False) -> Symmetry:
    """Return the symmetry of an adapted model: the base model's under its new names, with adapters that follow.

    Args:
        symmetry: symmetry of the model without adapters.
        state: state of the adapted model, with its base.
        fan_in_fan_out: option of the adapters' config: adapted weights are stored `[in, out]`, as in GPT-2.

    Raises:
        SymmetryError: the symmetry folds norms, or an adapter cannot follow its layer.
    """
    # A fold multiplies one weight; a product of factors has no single weight to multiply.
    if symmetry.folds:
        raise SymmetryError("a norm cannot be folded into factors; give a symmetry without folds")
    names = _adapted_names(state)
    spaces = tuple(_extend(space, names, state, fan_in_fan_out) for space in symmetry.spaces)
    shifts = tuple(renamed for shift in symmetry.shifts for renamed in _rename_shift(shift, names, state))
    return Symmetry((*spaces, *adapters(state).spaces), shifts=shifts)


def _inner_space(state: State, name: str, group: Callable[[int], Group]) -> Space:
    partner = _partner(name)
    if partner not in state:
        raise SymmetryError(f"{name!r} has no partner {partner!r}; give both factors, because they move together")
    inner = group(state[name].shape[0])
    return Space(
        name.removeprefix(_PREFIX).replace(".lora_A", "").removesuffix(".weight"),
        inner,
        # B is on the last role: the dual role of maps that stretch, the only role of rotations.
        (Axis(name, 0), Axis(partner, 1, role=len(inner.sizes) - 1)),
    )


def _partner(name: str) -> str:
    return name.replace(".lora_A", ".lora_B").replace("lora_embedding_A", "lora_embedding_B")


def _adapted_names(state: State) -> Mapping[str, list[str]]:
    """Return for each tensor of the base its names in the adapted model; a module that is trained whole has two."""
    result: dict[str, list[str]] = {}
    for name in state:
        if ".lora_" not in name:
            result.setdefault(_ADDED.sub("", name.removeprefix(_PREFIX)), []).append(name)
    return result


def _rename_shift(shift: Shift, names: Mapping[str, list[str]], state: State) -> Iterator[Shift]:
    """Yield the renamed shift, unless its projection is adapted and therefore no single tensor any more."""
    (bias,) = names.get(shift.bias, [shift.bias])
    if shift.output is None:
        yield replace(shift, bias=bias)
    elif shift.output.weight in state or f"{_PREFIX}{shift.output.weight}" in state:
        weight, output = (names[name][0] for name in (shift.output.weight, shift.output.bias))
        yield replace(shift, bias=bias, output=replace(shift.output, weight=weight, bias=output))


def _extend(space: Space, names: Mapping[str, list[str]], state: State, transposed: bool) -> Space:
    """Return a space of the base model with the axes of the adapters that follow it."""
    axes = tuple(
        follower
        for axis in space.axes
        for name in names.get(axis.tensor, [axis.tensor])
        for follower in (replace(axis, tensor=name), *_factors(space, axis, name, state, transposed))
    )
    return replace(space, axes=axes)


def _factors(space: Space, axis: Axis, name: str, state: State, transposed: bool) -> Iterator[Axis]:
    """Yield the axes of a layer's adapters that follow an axis of its weight."""
    layer = name.removesuffix(".base_layer.weight")
    for factor in state if layer != name else ():
        match = _INNER.fullmatch(factor)
        if match and match["layer"] == layer:
            reads = axis.dim == (0 if transposed or match["table"] else 1)
            yield replace(axis, tensor=factor if reads else _partner(factor), dim=int(reads))
        # DoRA: one magnitude for each output of the layer.
        elif factor.startswith(f"{layer}.lora_magnitude_vector.") and axis.dim == 0:
            yield _magnitude(space, axis, factor)


def _magnitude(space: Space, axis: Axis, name: str) -> Axis:
    if not space.group.is_permutation:
        raise SymmetryError(
            f"{name!r} scales outputs one by one, but {space.group} of space {space.name!r} mixes them; "
            "leave the space out, or adapt without magnitudes"
        )
    return replace(axis, tensor=name)
