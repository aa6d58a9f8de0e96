"""A symmetry as data: the sites of an architecture, and a notation for them.

A *site* is a feature space inside a model; its group may act on it without changing the function, if it acts
on every tensor that writes or reads the space. In the notation a site is one line:

    hidden   S(512)              0.weight[0] 0.bias[0] 2.weight[1]
    conv1    S(16)               conv.weight[0] bn.weight[0] bn.bias[0] (bn.running_mean[0]) fc.weight[1]
    heads.0  O(8)*O(8) wr S(4)   q.weight[0]@0 q.bias[0]@0 k.weight[0]@0 v.weight[0]@1 o.weight[1]@1
    fused.0  O(8)^4              in_proj.weight[0,0:32] in_proj.weight[0,32:64]

`tensor[axis]` is the axis that the site owns and `tensor[axis,start:stop]` a part of it; `@leg` says which
of the group's feature spaces it is; parentheses mark what moves with the site but does not count in matching.
An axis that is longer than the site gives every unit a run of consecutive entries (a flattened channel).
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fedbasin.strategies.state import State
from fedbasin.strategies.symmetry.element import Element
from fedbasin.strategies.symmetry.groups import Group, Orthogonal, Permutation, Wreath


class SymmetryError(ValueError):
    """A symmetry that does not parse, or does not fit the tensors that it names."""


@dataclass(frozen=True)
class Member:
    """One axis of one tensor that belongs to a site.

    Attributes:
        tensor: name in the state.
        axis: the axis that the element acts on.
        part: start and stop on that axis, or None for all of it.
        leg: which of the group's feature spaces it is.
        scored: whether it counts in matching. Running statistics move with their unit, but their size
            says nothing about which unit it is.
    """

    tensor: str
    axis: int
    part: tuple[int, int] | None = None
    leg: int = 0
    scored: bool = True

    def __str__(self) -> str:
        part = f",{self.part[0]}:{self.part[1]}" if self.part else ""
        leg = f"@{self.leg}" if self.leg else ""
        text = f"{self.tensor}[{self.axis}{part}]{leg}"
        return text if self.scored else f"({text})"

    def view(self, tensor: Tensor) -> Tensor:
        """The part of `tensor` that the site owns."""
        if self.part is None:
            return tensor
        start, stop = self.part
        return tensor.narrow(self.axis, start, stop - start)

    def rows(self, tensor: Tensor, width: int) -> Tensor:
        """The part as a matrix `[width, features]`: one row for every unit of the site."""
        return self.view(tensor).movedim(self.axis, 0).reshape(width, -1)

    def act(self, element: Element, tensor: Tensor) -> Tensor:
        """`tensor` with the element applied to the part."""
        if self.part is None:
            return element.act(tensor, self.axis, self.leg)
        result = tensor.clone()
        self.view(result).copy_(element.act(self.view(tensor), self.axis, self.leg))
        return result


@dataclass(frozen=True)
class Site:
    """A feature space, what may act on it, and where it appears."""

    name: str
    group: Group
    members: tuple[Member, ...]

    def __str__(self) -> str:
        return f"{self.name}  {self.group}  " + " ".join(map(str, self.members))

    def width(self, leg: int = 0) -> int:
        """Units of one leg."""
        return self.group.count * self.group.sizes[leg]

    @cached_property
    def scored(self) -> tuple[Member, ...]:
        """The members that count in matching."""
        return tuple(member for member in self.members if member.scored)

    @cached_property
    def quadratic(self) -> bool:
        """Whether one tensor carries the site on two axes, so that no step is an exact maximiser."""
        axes = {(member.tensor, member.axis) for member in self.scored}
        return len(axes) > len({tensor for tensor, _ in axes})


@dataclass(frozen=True)
class Symmetry:
    """All sites of an architecture. `parse(str(s)) == s`."""

    sites: tuple[Site, ...]

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SymmetryError(
                f"site {twice[0]!r} stands twice; every site needs a name of its own"
            )
        for site in self.sites:
            if _site(str(site)) != site:
                raise SymmetryError(f"site {site.name!r} cannot be written down: {site}")

    def __str__(self) -> str:
        return "".join(f"{site}\n" for site in self.sites)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the notation: two parties with the same digest move the same tensors."""
        return hashlib.sha256(str(self).encode()).digest()

    def check(self, state: State) -> None:
        """Check that every member fits the tensors of a model.

        Raises:
            SymmetryError: a tensor is missing or not floating, an axis is not a multiple of its site's
                width, a leg has nothing to match by, or two members overlap.
        """
        for site in self.sites:
            _check_legs(site)
            for member in site.members:
                _check(site, member, state)
        _check_overlaps(self, state)


def _check(site: Site, member: Member, state: State) -> None:
    where = f"site {site.name!r}, member {member}"
    if member.tensor not in state:
        raise SymmetryError(
            f"{where}: the model has no such tensor; was it made for another model?"
        )
    if not state[member.tensor].is_floating_point():
        raise SymmetryError(
            f"{where}: the tensor is {state[member.tensor].dtype}; only floating tensors can be matched"
        )
    shape = tuple(state[member.tensor].shape)
    if not -1 < member.axis < len(shape):
        raise SymmetryError(f"{where}: the tensor has shape {shape} and no axis {member.axis}")
    if not member.leg < len(site.group.sizes):
        raise SymmetryError(f"{where}: {site.group} has legs 0 to {len(site.group.sizes) - 1}")
    start, stop = member.part or (0, shape[member.axis])
    width = site.width(member.leg)
    if not 0 <= start < stop <= shape[member.axis] or (stop - start) % width:
        raise SymmetryError(
            f"{where}: entries {start} to {stop} of an axis of {shape[member.axis]} are not a multiple "
            f"of the site's {width} units"
        )


def _check_legs(site: Site) -> None:
    silent = set(range(len(site.group.sizes))) - {member.leg for member in site.scored}
    if silent:
        raise SymmetryError(
            f"site {site.name!r} has no scored member on leg {min(silent)}; add one to match by"
        )


def _check_overlaps(symmetry: Symmetry, state: State) -> None:
    claimed: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    for site in symmetry.sites:
        for member in site.members:
            start, stop = member.part or (0, state[member.tensor].shape[member.axis])
            taken = claimed.setdefault((member.tensor, member.axis), [])
            for other_start, other_stop, other in taken:
                if start < other_stop and other_start < stop:
                    raise SymmetryError(
                        f"site {site.name!r}, member {member}: site {other!r} already moves entries of "
                        f"this axis; give each entry to one site"
                    )
            taken.append((start, stop, site.name))


_MEMBER = re.compile(
    r"(?P<open>\()?(?P<tensor>[^\s\[\]()]+)\[(?P<axis>\d+)(?:,(?P<start>\d+):(?P<stop>\d+))?\]"
    r"(?:@(?P<leg>\d+))?(?P<close>\))?"
)
_GROUP = re.compile(r"[SO]\(\d+\)(?:\^\d+)?(?:\*[SO]\(\d+\))*(?: wr S\(\d+\))?")
_LINE = re.compile(rf"(?P<name>[^\s#]\S*)\s+(?P<group>{_GROUP.pattern})\s+(?P<members>\S.*)")


def parse(text: str) -> Symmetry:
    """Read the notation; blank lines and lines that begin with `#` are skipped.

    Raises:
        SymmetryError: naming the line that is not in the notation.
    """
    lines = (line.strip() for line in text.splitlines())
    return Symmetry(tuple(_site(line) for line in lines if line and not line.startswith("#")))


def _site(line: str) -> Site:
    match = _LINE.fullmatch(line)
    if match is None:
        raise SymmetryError(f"not a site: {line!r}; write `name  S(8)  tensor[axis] ...`")
    members = tuple(_member(word, line) for word in match["members"].split())
    return Site(match["name"], _group(match["group"], line), members)


def _member(word: str, line: str) -> Member:
    match = _MEMBER.fullmatch(word)
    if match is None or (match["open"] is None) != (match["close"] is None):
        raise SymmetryError(f"not a member: {word!r} in {line!r}; write `tensor[axis]`")
    part = (int(match["start"]), int(match["stop"])) if match["start"] else None
    scored = match["open"] is None
    return Member(match["tensor"], int(match["axis"]), part, int(match["leg"] or 0), scored)


def _group(text: str, line: str) -> Group:
    inner, _, outer = text.partition(" wr ")
    if re.search(r"(?<!\d)0", text):
        raise SymmetryError(f"a group without units: {text!r} in {line!r}")
    if outer and "^" in inner:
        raise SymmetryError(
            f"{text!r} repeats blocks and exchanges them in {line!r}; write the block once"
        )
    if outer:
        return Wreath(tuple(map(_factor, inner.split("*"))), int(outer[2:-1]))
    if "*" in inner:
        raise SymmetryError(
            f"{text!r} has several legs but nothing exchanges them in {line!r}; write two sites"
        )
    if inner[0] == "S" and "^" in inner:
        raise SymmetryError(
            f"{text!r} in {line!r}: only rotations repeat; permutations in blocks need a site each"
        )
    return _factor(inner)


def _factor(text: str) -> Permutation | Orthogonal:
    base, _, count = text.partition("^")
    size = int(base[2:-1])
    return Orthogonal(size, int(count or 1)) if base[0] == "O" else Permutation(size)
