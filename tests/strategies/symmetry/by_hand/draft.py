"""A symmetry under construction: its spaces, the layers that write and read them, and a check that none is missing.

A family declares for every layer the spaces that it reads and writes. Tensors that a family does not declare are
refused by name, because such a tensor may read a space that is transformed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from fedbasin.strategies.symmetry.groups.block_groups import Inner
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal, Permutation, Wreath
from fedbasin.strategies.symmetry.groups.shared_heads import SharedHeads
from fedbasin.strategies.symmetry.symmetry import Axis, Space, Symmetry, SymmetryError
from fedbasin.strategies.symmetry.translation import Output, Shift
from fedbasin.strategies.tensors.state import State, tied

# Frequencies and masks that some versions save with the weights; no client trains them.
_BUFFERS = ("*.inv_freq", "*.masked_bias", "*.attn.bias", "*.attention.bias")


@dataclass(frozen=True)
class Config:
    """The configuration of a model, as a mapping or as an object with attributes."""

    source: object

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the value of the first of `names` that is set, or the default."""
        values = (self._lookup(name) for name in names)
        return next((value for value in values if value is not None), default)

    def count(self, *names: str) -> int:
        """Return the value of the first of `names` that is set, which must be a positive integer.

        Raises:
            SymmetryError: no name is set, or the value is not a positive integer.
        """
        value = self.get(*names)
        if not isinstance(value, int) or value < 1:
            raise SymmetryError(f"the config has no positive {names[0]!r}; give the model's own config")
        return value

    def _lookup(self, name: str) -> Any:
        if isinstance(self.source, Mapping):
            return self.source.get(name)
        return getattr(self.source, name, None)


@dataclass
class Draft:
    """The spaces and shifts of a model that are declared so far.

    Attributes:
        state: tensors of the model; only names and shapes are read.
        spaces: spaces by name, in the order of their declaration.
        fixed: patterns of tensors that no space transforms.
        shifts: biases to which any vector may be added.
    """

    state: State
    spaces: dict[str, Space] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    shifts: list[Shift] = field(default_factory=list)

    def space(self, name: str, group: Group, role: int = 0) -> "Role":
        """Declare a new space, and return one of its roles."""
        self.spaces[name] = Space(name, group, ())
        return Role(self, name, role)

    def has(self, layer: str) -> bool:
        """Return whether the model has a tensor or a layer of that name."""
        return layer in self.state or f"{layer}.weight" in self.state

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            SymmetryError: the model has no tensor of that name.
        """
        if tensor not in self.state:
            raise SymmetryError(
                f"the model has no tensor {tensor!r}; give a model of this architecture with its own config"
            )
        return tuple(self.state[tensor].shape)

    def keep(self, *tensors: str) -> None:
        """Declare tensors that no space transforms, such as biases of labels, whether the model has them or not."""
        self.fixed |= set(tensors)

    def shifts_keys(self, layer: str, part: tuple[int, int] | None = None) -> None:
        """Declare a shift of a key bias, which is free if only queries meet the keys."""
        if f"{layer}.bias" in self.state:
            self.shifts.append(Shift(f"{layer}.bias", part))

    def shifts_values(
        self, layer: str, output: str, part: tuple[int, int] | None = None, *, period: int | None = None, axis: int = 1
    ) -> None:
        """Declare a shift of a value bias, which is free because the bias of the output projection compensates it."""
        value_bias, output_bias = f"{layer}.bias", f"{output}.bias"
        if value_bias in self.state and output_bias in self.state:
            projection = Output(f"{output}.weight", axis, output_bias)
            self.shifts.append(Shift(value_bias, part, period, projection))

    def finish(self, *left_out: str) -> Symmetry:
        """Return the symmetry without the spaces in `left_out`.

        Raises:
            SymmetryError: a tensor was not declared, or two names of one tensor would be transformed differently.
        """
        self._refuse_undeclared()
        self._refuse_split_ties()
        spaces = tuple(space for name, space in self.spaces.items() if name not in left_out)
        symmetry = Symmetry(spaces, shifts=tuple(self.shifts))
        symmetry.check(self.state)
        return symmetry

    def _refuse_undeclared(self) -> None:
        declared = {axis.tensor for space in self.spaces.values() for axis in space.axes}
        patterns = (*self.fixed, *_BUFFERS)
        for tensor, value in self.state.items():
            # Integer tensors are counters and indices, which nothing transforms: they need no declaration.
            is_declared = tensor in declared or any(fnmatchcase(tensor, p) for p in patterns)
            if value.is_floating_point() and not is_declared:
                raise SymmetryError(
                    f"{tensor!r} is not a tensor of this architecture, so the spaces that it reads are unknown; "
                    "leave it out of the state or write the symmetry as text"
                )

    def _refuse_split_ties(self) -> None:
        moves: dict[str, set[tuple[str, Axis]]] = {}
        for space in self.spaces.values():
            for axis in space.axes:
                move = (space.name, replace(axis, tensor="", scored=True))
                moves.setdefault(axis.tensor, set()).add(move)
        # Meta tensors have no memory and would all seem to share the same.
        real = {name: tensor for name, tensor in self.state.items() if not tensor.is_meta}
        for name, first_name in tied(real).items():
            if moves.get(name) != moves.get(first_name):
                raise SymmetryError(
                    f"{first_name!r} and {name!r} are one tensor, which this config would move in two ways; "
                    "is its tie_word_embeddings the model's own?"
                )


@dataclass(frozen=True)
class Role:
    """A role of a space under construction; its methods add axes."""

    draft: Draft
    space: str
    role: int = 0

    def at(self, role: int) -> "Role":
        """Return another role of the space."""
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
        """Add an axis of a tensor, whose length must fit the width of the role.

        Raises:
            SymmetryError: there is no such tensor, or its shape does not fit.
        """
        shape = self.draft.shape(tensor)
        space = self.draft.spaces[self.space]
        axis = Axis(tensor, dim, part, self.role, scored, period, outer)
        if dim >= len(shape) or axis.length(shape) != space.width(self.role):
            raise SymmetryError(
                f"{tensor} has shape {shape}, whose axis {dim} does not hold the {space.width(self.role)} "
                f"units of {self.space!r}; is the config the model's own?"
            )
        self.draft.spaces[self.space] = replace(space, axes=(*space.axes, axis))

    def writes(
        self,
        layer: str,
        axis: int = 0,
        part: tuple[int, int] | None = None,
        *,
        period: int | None = None,
        bias_scored: bool = True,
    ) -> None:
        """Add the weight and the bias, if there is one, of a layer that writes the role."""
        self.moves(f"{layer}.weight", axis, part, period=period)
        if f"{layer}.bias" in self.draft.state:
            self.moves(f"{layer}.bias", 0, part, period=period, scored=bias_scored)

    def reads(self, *layers: str, axis: int = 1, scored: bool = True) -> None:
        """Add the weights of layers that read the role; a table of embeddings counts as one."""
        for layer in layers:
            # A table is stored [tokens, features], so its features are on the axis with which a Linear reads.
            self.moves(f"{layer}.weight", axis, scored=scored)

    def scales(self, *norms: str) -> None:
        """Add the weights and biases of norms over the role."""
        for norm in norms:
            self.writes(norm)


@dataclass(frozen=True)
class Projections:
    """The names of the four projections of an attention."""

    query: str
    key: str
    value: str
    output: str


def heads(draft: Draft, name: str, layers: Projections, count: int, *, key_bias_scored: bool = False) -> Role:
    """Declare heads without rotary positions: `O(d)*O(d) wr S(count)`, with roles query-key and value-output.

    A key bias adds the same number to all scores of a query. It is transformed but does not count in matching, unless
    something besides the query reads the keys.
    """
    group = Wreath((_rotation(draft, layers.query, count), _rotation(draft, layers.value, count)), count)
    space = draft.space(name, group)
    space.writes(layers.query)
    space.writes(layers.key, bias_scored=key_bias_scored)
    space.at(1).writes(layers.value)
    space.at(1).reads(layers.output)
    if not key_bias_scored:
        draft.shifts_keys(layers.key)
    draft.shifts_values(layers.value, layers.output)
    return space


def _rotation(draft: Draft, layer: str, count: int) -> Orthogonal:
    return Orthogonal(share(draft.shape(f"{layer}.weight")[0], count, layer))


def share(width: int, count: int, layer: str) -> int:
    """Return the number of entries of one of `count` heads.

    Raises:
        SymmetryError: the number of outputs of the layer is not a multiple of the number of heads.
    """
    if width % count:
        raise SymmetryError(f"{layer} writes {width} features, which {count} heads cannot share")
    return width // count


def grouped_heads(draft: Draft, name: str, layers: Projections, rotation: Inner, queries: int, keys: int) -> None:
    """Declare heads of which several queries share a key and a value; `rotation` acts on queries and keys."""
    # Queries rotate with their key, and outputs with their value, so only keys and values have groups of their own.
    value = _rotation(draft, layers.value, keys)
    many = share(queries, keys, "a key head")
    inners: tuple[Inner, ...] = (rotation, value)
    space = draft.space(name, Wreath(inners if many == 1 else (SharedHeads(inners, many),), keys))
    query, output = (space, space.at(1)) if many == 1 else (space.at(2), space.at(3))
    # A shared value is read once by every query head, which a shift cannot express.
    if many == 1:
        draft.shifts_values(layers.value, layers.output)
    space.writes(layers.key)
    query.writes(layers.query)
    space.at(1).writes(layers.value)
    output.reads(layers.output)


def signed(count: int, *, scales: bool = False) -> Wreath:
    """Return the signed permutations `O(1) wr S(count)`, with which a root mean square norm commutes.

    Args:
        count: number of units.
        scales: add a second role that follows the order without the sign, for the weights of norms.
    """
    return Wreath((Orthogonal(1), Permutation(1)) if scales else (Orthogonal(1),), count)


def gated(count: int) -> Wreath:
    """Return the group of the hidden units of `down(act(gate(x)) * up(x))`: permutations, and signs on `up`.

    Role 0 is the gate, role 1 are up and down, between which a unit may change its sign because `up` is linear.
    """
    return Wreath((Permutation(1), Orthogonal(1)), count)
