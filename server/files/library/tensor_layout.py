"""Where each entry of a module's tensors is stored, found by loading numbers in place of the values.

A library renames, stacks, splits and transposes the tensors of a file when it loads it. No rule of this is repeated
here: every stored entry is numbered, the library loads the numbers, and where they arrive is the layout. A block of a
module's tensor is a strided view of one stored tensor as a rule; an order that is none is kept as indices.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True, eq=False)
class StoredBlock:
    """A block of a module's tensor, and the entries of a stored tensor that it holds.

    Attributes:
        stored: name of the stored tensor.
        block: start and stop of the block on each dimension of the module's tensor.
        offset: index of the stored entry that comes first.
        strides: step between stored entries on each dimension of the block.
        order: indices of the stored entries in the order of the block, if no strides describe it.
    """

    stored: str
    block: tuple[tuple[int, int], ...]
    offset: int = 0
    strides: tuple[int, ...] = ()
    order: Tensor | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """Return the block of a module's tensor, as a view."""
        for dim, (start, stop) in enumerate(self.block):
            tensor = tensor.narrow(dim, start, stop - start)
        return tensor

    def values(self, stored: Tensor) -> Tensor:
        """Return the values of the block, from the stored tensor."""
        shape = tuple(stop - start for start, stop in self.block)
        flat = stored.contiguous().flatten()
        if self.order is not None:
            return flat[self.order].reshape(shape)
        return flat.as_strided(shape, self.strides, flat.storage_offset() + self.offset)

    def write(self, stored: Tensor, values: Tensor) -> None:
        """Write the values of the block into a stored tensor, which must be contiguous."""
        flat = stored.view(-1)
        if self.order is not None:
            flat[self.order] = values.reshape(-1)
        else:
            flat.as_strided(values.shape, self.strides, self.offset).copy_(values)


@dataclass(frozen=True, eq=False)
class TensorLayout:
    """The stored entries of a module's tensors.

    Attributes:
        pieces: for each of the module's tensors that is stored, its blocks.
        unread: stored tensors that the module does not load; they stay as they are.
        missing: the module's tensors, or parts of them, that are not stored, so that no element may move them.
        integers: floating tensors of the module that are loaded from stored integers; they are missing too.
        whole: for each stored tensor that is one tensor of the module, under another name perhaps, that name.
        copies: for each stored tensor that is a copy of another, because the module ties the two, that other one.
    """

    pieces: Mapping[str, tuple[StoredBlock, ...]]
    unread: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def readers(self) -> dict[str, list[tuple[str, StoredBlock]]]:
        """For each stored tensor the pieces that hold its entries, with the names of the module's tensors."""
        result: dict[str, list[tuple[str, StoredBlock]]] = {}
        for name, pieces in self.pieces.items():
            for piece in pieces:
                result.setdefault(piece.stored, []).append((name, piece))
        return result

    @cached_property
    def twins(self) -> frozenset[str]:
        """The module's tensors that hold the stored entries of another one before them, because the two are tied."""
        names: dict[object, str] = {}
        keys = {n: tuple((p.stored, p.block, p.offset, p.strides) for p in parts) for n, parts in self.pieces.items()}
        return frozenset(name for name, key in keys.items() if names.setdefault(key, name) != name)


def find_layout(stored: State, load: Callable[[State], tuple[State, set[str]]]) -> TensorLayout:
    """Return where the entries of a module's tensors are stored.

    Args:
        stored: the stored tensors; only names, shapes and dtypes are read.
        load: loads a state of the stored names, in float64, and returns the state of the module with the names of the
            tensors that it lacked.
    """
    floating = {name: tensor for name, tensor in stored.items() if tensor.is_floating_point()}
    starts = _starts(floating)
    numbers = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in stored.items() if name not in floating}
    for (name, tensor), start in zip(floating.items(), starts, strict=True):
        count = torch.arange(start + 1, start + 1 + tensor.numel(), dtype=torch.float64)
        numbers[name] = count.view(tensor.shape)
    state, lacking = load(numbers)
    numbering = _Numbering(list(floating), torch.tensor(starts), sum(t.numel() for t in floating.values()))
    pieces: dict[str, tuple[StoredBlock, ...]] = {}
    missing = set(lacking)
    integers = []
    for name, tensor in state.items():
        if name in lacking or not tensor.is_floating_point() or not tensor.numel():
            continue
        blocks = numbering.pieces(tensor.double())
        if blocks is None:
            missing.add(name)
            # Stored integers have no numbers, and arrive as the zeros that stand for them.
            integers += [] if tensor.any() else [name]
        else:
            pieces[name] = blocks
    read = {piece.stored for parts in pieces.values() for piece in parts}
    unread = tuple(name for name in stored if name not in read)
    return TensorLayout(pieces, unread, tuple(sorted(missing)), tuple(integers), _whole(pieces, stored))


def with_copies(layout: TensorLayout, stored: State) -> TensorLayout:
    """Return a layout in which copies of tied tensors move with the tensors that the module reads.

    Args:
        layout: the layout, in which the copies are not read.
        stored: the stored tensors; the values of possible copies are compared.
    """
    copies = {}
    for name in layout.unread:
        pieces = layout.pieces.get(name, ())
        # The module has a tensor of this name, whose values come from another stored tensor.
        if len(pieces) == 1 and torch.equal(stored[name], stored[pieces[0].stored]):
            copies[name] = pieces[0].stored
    return replace(layout, unread=tuple(name for name in layout.unread if name not in copies), copies=copies)


def identity_layout(state: State) -> TensorLayout:
    """Return the layout of a module whose tensors are stored as they are, under their names."""
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()}
    pieces = {name: (_whole_piece(name, tensor),) for name, tensor in floating.items()}
    return TensorLayout(pieces, whole={name: name for name in pieces})


class ModuleState(Mapping[str, Tensor]):
    """The state of a module, read tensor by tensor from stored tensors."""

    def __init__(self, layout: TensorLayout, stored: State) -> None:
        self._layout = layout
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._layout.pieces[name]
        if self._layout.whole.get(pieces[0].stored) == name:
            return self._stored[pieces[0].stored]
        parts = [piece.values(self._stored[piece.stored]) for piece in pieces]
        dtype = parts[0].dtype
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        result = torch.empty(
            [max(p.block[d][1] for p in pieces) for d in range(parts[0].dim())], dtype=dtype, device=parts[0].device
        )
        for piece, part in zip(pieces, parts, strict=True):
            piece.view(result).copy_(part)
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.pieces)

    def __len__(self) -> int:
        return len(self._layout.pieces)


class StoredState(Mapping[str, Tensor]):
    """The stored tensors of a module's state: those that it does not load are the original ones.

    Tensors have the dtypes of the module's state.
    """

    def __init__(self, layout: TensorLayout, stored: State, state: State) -> None:
        self._layout = layout
        self._stored = stored
        self._state = state
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        readers = self._layout.readers.get(name)
        if name in self._layout.copies:
            return self[self._layout.copies[name]]
        if readers is None:
            return self._stored[name]
        if name in self._layout.whole:
            return self._module_tensor(self._layout.whole[name])
        values = [(piece, piece.view(self._module_tensor(reader))) for reader, piece in readers]
        original = self._stored[name]
        result = original.to(values[0][1].dtype, copy=True).contiguous()
        for piece, value in values:
            piece.write(result, value)
        return result

    def _module_tensor(self, name: str) -> Tensor:
        # The tensors of a stack of experts follow each other, and each needs the stack. Threads share the last one.
        last = self._last
        if last is None or last[0] != name:
            self._last = last = (name, self._state[name])
        return last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclass(frozen=True, eq=False)
class _Numbering:
    """The numbers of all stored entries: those of a tensor follow each other, from `starts` on."""

    names: list[str]
    starts: Tensor
    total: int

    def pieces(self, tensor: Tensor) -> tuple[StoredBlock, ...] | None:
        """Return the blocks of a tensor of numbers, or None if entries of it are no numbers of stored ones."""
        if bool(((tensor != tensor.round()) | (tensor < 1) | (tensor > self.total)).any()):
            return None
        indices = tensor.long() - 1
        return tuple(self._split(indices, tuple((0, length) for length in indices.shape)))

    def _split(self, indices: Tensor, block: tuple[tuple[int, int], ...]) -> Iterator[StoredBlock]:
        source = self._source(indices.min())
        start = int(self.starts[source])
        if int(self._source(indices.max())) == int(source):
            strides = _strides(indices)
            order = None if strides else (indices - start).flatten()
            offset = int(indices.flatten()[0]) - start
            yield StoredBlock(self.names[source], block, offset, strides or (), order)
            return
        dim, cuts = self._cuts(indices)
        begin, end = block[dim]
        for low, high in pairwise([0, *cuts, end - begin]):
            part = (*block[:dim], (begin + low, begin + high), *block[dim + 1 :])
            yield from self._split(indices.narrow(dim, low, high - low), part)

    def _cuts(self, indices: Tensor) -> tuple[int, list[int]]:
        """Return a dimension along which the stored tensor changes, and the places where it does."""
        for dim in range(indices.dim()):
            sources = self._source(indices.movedim(dim, 0).flatten(1)[:, 0].contiguous())
            if cuts := ((sources[1:] != sources[:-1]).nonzero().flatten() + 1).tolist():
                return dim, cuts
        # Tensors that alternate within a line are taken apart line by line.
        dim = next(dim for dim, length in enumerate(indices.shape) if length > 1)
        return dim, list(range(1, indices.shape[dim]))

    def _source(self, indices: Tensor) -> Tensor:
        return torch.searchsorted(self.starts, indices, right=True) - 1


def _strides(indices: Tensor) -> tuple[int, ...] | None:
    """Return the steps between the indices on each dimension, or None if they are not the same everywhere."""
    origin = indices.flatten()[0]
    expected = origin.clone()
    strides = []
    for dim, length in enumerate(indices.shape):
        start = indices.movedim(dim, 0).flatten(1)[:, 0] if indices.dim() > 1 else indices
        strides.append(int(start[1] - origin) if length > 1 else 0)
        steps = torch.arange(length) * strides[-1]
        expected = expected.unsqueeze(-1) + steps
    is_strided = min(strides, default=0) >= 0 and torch.equal(expected.reshape(indices.shape), indices)
    return tuple(strides) if is_strided else None


def _starts(state: State) -> list[int]:
    return list(accumulate((tensor.numel() for tensor in state.values()), initial=0))[:-1]


def _whole_piece(name: str, tensor: Tensor) -> StoredBlock:
    strides = torch.empty(tensor.shape, device="meta").stride()
    return StoredBlock(name, tuple((0, length) for length in tensor.shape), 0, strides)


def _whole(pieces: Mapping[str, tuple[StoredBlock, ...]], stored: State) -> dict[str, str]:
    """Return for each stored tensor that is one tensor of the module, of the same shape, the first name of it."""
    result: dict[str, str] = {}
    for name, (piece, *rest) in pieces.items():
        expected = _whole_piece(piece.stored, stored[piece.stored])
        steps = [
            a == b or end == 1 for a, b, (_, end) in zip(piece.strides, expected.strides, piece.block, strict=False)
        ]
        is_whole = not rest and piece.order is None and piece.block == expected.block and all(steps)
        if is_whole and piece.offset == 0:
            result.setdefault(piece.stored, name)
    return result
