"""A symmetry under construction: spaces, what writes and reads them, and that nothing was forgotten.

A family says of every layer which space it reads and which it writes. What a model has beyond that is refused
by name: a tensor nobody spoke of may read a space that is about to move.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from fedbasin.strategies.symmetry.groups.block_groups import Inner, Shared
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Wreath
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError
from fedbasin.strategies.symmetry.translation import Output, Shift
from fedbasin.strategies.tensors.state import State, tied

# Frequencies and masks that some versions save with the weights: no client trains them.
_BUFFERS = ("*.inv_freq", "*.masked_bias", "*.attn.bias", "*.attention.bias")


@dataclass(frozen=True)
class Config:
    """A model's configuration, from a mapping or from an object with attributes."""

    source: object

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that is set."""
        for name in names:
            found = self._lookup(name)
            if found is not None:
                return found
        return default

    def count(self, *names: str) -> int:
        """A positive number that must be set.

        Raises:
            SymmetryError: none of the names is.
        """
        found = self.get(*names)
        if not isinstance(found, int) or found < 1:
            raise SymmetryError(
                f"the config has no positive {names[0]!r}; give the model's own config"
            )
        return found

    def _lookup(self, name: str) -> Any:
        if isinstance(self.source, Mapping):
            return self.source.get(name)
        return getattr(self.source, name, None)


@dataclass
class Draft:
    """The spaces of a model so far, in order.

    Attributes:
        state: tensors of the model; only names and shapes are read.
    """

    state: State
    spaces: dict[str, Space] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    shifts: list[Shift] = field(default_factory=list)

    def space(self, name: str, group: Group, role: int = 0) -> "Role":
        """A new space, and its first role."""
        self.spaces[name] = Space(name, group, ())
        return Role(self, name, role)

    def has(self, layer: str) -> bool:
        """Whether the model has a tensor or a layer of that name."""
        return layer in self.state or f"{layer}.weight" in self.state

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            SymmetryError: the model has none of that name.
        """
        if tensor not in self.state:
            raise SymmetryError(
                f"the model has no tensor {tensor!r}; its architecture is another, or the config is not its own"
            )
        return tuple(self.state[tensor].shape)

    def keep(self, *tensors: str) -> None:
        """Tensors that no space moves, if the model has them: what is written to labels, buffers."""
        self.fixed |= set(tensors)

    def shifts_keys(self, layer: str, part: tuple[int, int] | None = None) -> None:
        """Any vector may be added to a key bias that only queries meet."""
        if f"{layer}.bias" in self.state:
            self.shifts.append(Shift(f"{layer}.bias", part))

    def shifts_values(
        self,
        layer: str,
        output: str,
        part: tuple[int, int] | None = None,
        *,
        period: int | None = None,
        axis: int = 1,
    ) -> None:
        """Any vector may be added to a value bias, as the bias of the output projection takes it up."""
        value, taking = f"{layer}.bias", f"{output}.bias"
        if value in self.state and taking in self.state:
            into = Output(f"{output}.weight", axis, taking)
            self.shifts.append(Shift(value, part, period, into))

    def finish(self, *left_out: str) -> Symmetry:
        """The symmetry without the spaces that are `left_out`.

        Raises:
            SymmetryError: naming a tensor that no space moves and that is not known to stay, or two names of
                one tensor that would move apart.
        """
        self._refuse_forgotten()
        self._refuse_torn()
        spaces = tuple(space for name, space in self.spaces.items() if name not in left_out)
        found = Symmetry(spaces, shifts=tuple(self.shifts))
        found.check(self.state)
        return found

    def _refuse_forgotten(self) -> None:
        spoken = {axis.tensor for space in self.spaces.values() for axis in space.axes}
        for tensor, value in self.state.items():
            known = tensor in spoken or any(fnmatchcase(tensor, p) for p in self._staying())
            if value.is_floating_point() and not known:
                raise SymmetryError(
                    f"{tensor!r} is no tensor of this architecture, so what it reads and writes is unknown; "
                    "leave it out of the state or write the symmetry as text"
                )

    def _refuse_torn(self) -> None:
        moves: dict[str, set[tuple[str, Axis]]] = {}
        for space in self.spaces.values():
            for axis in space.axes:
                move = (space.name, replace(axis, tensor="", scored=True))
                moves.setdefault(axis.tensor, set()).add(move)
        # Tensors without memory share none.
        real = {name: tensor for name, tensor in self.state.items() if not tensor.is_meta}
        for name, first in tied(real).items():
            if moves.get(name) != moves.get(first):
                raise SymmetryError(
                    f"{first!r} and {name!r} are one tensor, which this config would move in two ways; "
                    "is its tie_word_embeddings the model's own?"
                )

    def _staying(self) -> Iterable[str]:
        return (*self.fixed, *_BUFFERS)


@dataclass(frozen=True)
class Role:
    """One role of a space; its methods add axes."""

    draft: Draft
    space: str
    role: int = 0

    def at(self, role: int) -> "Role":
        """Another role of the same space."""
        return replace(self, role=role)

    def moves(
        self,
        tensor: str,
        dim: int = 0,
        part: tuple[int, int] | None = None,
        *,
        scored: bool = True,
        period: int | None = None,
        outer: int | None = None,
    ) -> None:
        """Add one axis of one tensor, whose entries must be those of the role.

        Raises:
            SymmetryError: there is no such tensor, or its shape is another.
        """
        shape = self.draft.shape(tensor)
        old = self.draft.spaces[self.space]
        axis = Axis(tensor, dim, part, self.role, scored, period, outer)
        if dim >= len(shape) or _units(axis, shape) != old.width(self.role):
            raise SymmetryError(
                f"{tensor} has shape {shape}, which leaves axis {dim} other than the {old.width(self.role)} "
                f"units of {self.space!r}; is the config the model's own?"
            )
        self.draft.spaces[self.space] = replace(old, axes=(*old.axes, axis))

    def writes(
        self,
        layer: str,
        axis: int = 0,
        part: tuple[int, int] | None = None,
        *,
        period: int | None = None,
        bias_scored: bool = True,
    ) -> None:
        """Weight and, if there is one, bias of a layer that writes the role."""
        self.moves(f"{layer}.weight", axis, part, period=period)
        if f"{layer}.bias" in self.draft.state:
            self.moves(f"{layer}.bias", 0, part, period=period, scored=bias_scored)

    def reads(self, *layers: str, axis: int = 1, scored: bool = True) -> None:
        """Weights of layers that read the role; a table of embeddings is one."""
        for layer in layers:
            self.moves(f"{layer}.weight", axis, scored=scored)

    def scales(self, *norms: str) -> None:
        """Weight and, if there is one, bias of norms over the role."""
        for norm in norms:
            self.writes(norm)


def _units(axis: Axis, shape: tuple[int, ...]) -> int:
    length = shape[axis.dim]
    period = axis.period or length
    start, stop = axis.part or (0, period)
    slices = 1 if axis.outer is None else shape[axis.outer]
    return (stop - start) * (length // period) * slices


@dataclass(frozen=True)
class Projections:
    """The names of an attention's four layers."""

    query: str
    key: str
    value: str
    output: str


def heads(
    draft: Draft, name: str, layers: Projections, count: int, *, key_bias_scored: bool = False
) -> Role:
    """Heads without rotary positions: `O(d)*O(d) wr S(count)`, roles query-key and value-output.

    A key bias adds the same to all scores of a query, so it moves but does not count, unless something besides
    the query reads the keys.
    """
    group = Wreath(
        (_turned(draft, layers.query, count), _turned(draft, layers.value, count)), count
    )
    space = draft.space(name, group)
    space.writes(layers.query)
    space.writes(layers.key, bias_scored=key_bias_scored)
    space.at(1).writes(layers.value)
    space.at(1).reads(layers.output)
    if not key_bias_scored:
        draft.shifts_keys(layers.key)
    draft.shifts_values(layers.value, layers.output)
    return space


def _turned(draft: Draft, layer: str, count: int) -> Orthogonal:
    return Orthogonal(share(draft.shape(f"{layer}.weight")[0], count, layer))


def share(width: int, count: int, layer: str) -> int:
    """The entries of one of `count` heads.

    Raises:
        SymmetryError: the heads cannot share the layer's outputs.
    """
    if width % count:
        raise SymmetryError(f"{layer} writes {width} features, which {count} heads cannot share")
    return width // count


def grouped_heads(
    draft: Draft, name: str, layers: Projections, turn: Inner, queries: int, keys: int
) -> None:
    """Heads of which several queries share a key and a value; `turn` acts on queries and keys."""
    value = _turned(draft, layers.value, keys)
    many = share(queries, keys, "a key head")
    inners: tuple[Inner, ...] = (turn, value)
    space = draft.space(name, Wreath(inners if many == 1 else (Shared(inners, many),), keys))
    query, output = (space, space.at(1)) if many == 1 else (space.at(2), space.at(3))
    if many == 1:
        draft.shifts_values(layers.value, layers.output)
    space.writes(layers.key)
    query.writes(layers.query)
    space.at(1).writes(layers.value)
    output.reads(layers.output)
