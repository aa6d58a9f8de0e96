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
from fedbasin.strategies.symmetry.symmetry import Member, Site, Symmetry, SymmetryError
from fedbasin.strategies.symmetry.translation import Shift
from fedbasin.strategies.tensors.state import State

_INNER = re.compile(r"(?P<layer>.+)\.lora_(?P<table>embedding_)?A(?P<rest>\..+)?")
_ADDED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
_PREFIX = "base_model.model."


def general(rank: int) -> Wreath:
    """All of GL(rank), for a matching that also stretches; `Orthogonal` rotates only."""
    return Wreath((General(rank),), 1)


def adapters(state: State, group: Callable[[int], Group] = Orthogonal) -> Symmetry:
    """The inner spaces of a model's adapters, one site each.

    Args:
        state: of the adapted model, or of its adapters alone; only names and shapes are read.
        group: what acts on a space of a rank: `Orthogonal`, or `general`.

    Raises:
        SymmetryError: there are no adapters, or a factor lacks its partner.
    """
    found = [_inner_site(state, name, group) for name in state if _INNER.fullmatch(name)]
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
    sites = tuple(_following(site, names, state, fan_in_fan_out) for site in symmetry.sites)
    shifts = tuple(
        found for shift in symmetry.shifts for found in _renamed_shift(shift, names, state)
    )
    return Symmetry((*sites, *adapters(state).sites), shifts=shifts)


def _inner_site(state: State, name: str, group: Callable[[int], Group]) -> Site:
    partner = _partner(name)
    if partner not in state:
        raise SymmetryError(f"{name!r} has no partner {partner!r}; both factors move together")
    found = group(state[name].shape[0])
    return Site(
        name.removeprefix(_PREFIX).replace(".lora_A", "").removesuffix(".weight"),
        found,
        (Member(name, 0), Member(partner, 1, leg=len(found.sizes) - 1)),
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


def _following(site: Site, names: Mapping[str, list[str]], state: State, transposed: bool) -> Site:
    members = tuple(
        follower
        for member in site.members
        for name in names.get(member.tensor, [member.tensor])
        for follower in (
            replace(member, tensor=name),
            *_factors(site, member, name, state, transposed),
        )
    )
    return replace(site, members=members)


def _factors(
    site: Site, member: Member, name: str, state: State, transposed: bool
) -> Iterator[Member]:
    """The factors of a layer's adapters that have the member's axis."""
    layer = name.removesuffix(".base_layer.weight")
    for factor in state if layer != name else ():
        match = _INNER.fullmatch(factor)
        if match and match["layer"] == layer:
            reading = 0 if transposed or match["table"] else 1
            reads = member.axis == reading
            yield replace(member, tensor=factor if reads else _partner(factor), axis=int(reads))
        elif factor.startswith(f"{layer}.lora_magnitude_vector.") and member.axis == 0:
            yield _magnitude(site, member, factor)


def _magnitude(site: Site, member: Member, name: str) -> Member:
    if not isinstance(site.group, Permutation):
        raise SymmetryError(
            f"{name!r} scales outputs one by one, which {site.group} at site {site.name!r} mixes; "
            "leave the site out, or adapt without magnitudes"
        )
    return replace(member, tensor=name)
