"""Elementwise arithmetic on long tensors of any dtype, piece by piece, without temporaries of a tensor's length.

Each piece is converted to float32 (float64 where the first tensor is float64), computed on while it lies in the cache,
and rounded once. Threads share the pieces of a long tensor within `piece_threads`: where memory holds few long tensors
at a time, one thread for each would leave most cores idle.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

# Elements of a piece: 1 MiB of float32. Half of it costs a tenth more time, by torch's work for each call.
_PIECE = 2**18

# Pieces of a tensor for each thread, at least: fewer are not worth a thread.
_SHARE = 4

_threads = 1

T = TypeVar("T")
Parts = Sequence[Tensor]

# Entries of a sample that bounds a quantile, to within 1.6 percent of the entries.
_SAMPLE = 2**16


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a tensor is computed on."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@contextmanager
def piece_threads(count: int) -> Iterator[None]:
    """Share the pieces of long tensors among so many threads for each tensor, in all threads of the process."""
    global _threads
    previous, _threads = _threads, count
    try:
        yield
    finally:
        _threads = previous


def stacked_pieces(tensors: Sequence[Tensor]) -> Iterator[Float[Tensor, "tensors elements"]]:
    """Yield equal parts of tensors of one shape, stacked and converted."""
    return map(_stack, _split(tensors))


def map_pieces(kernel: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Return a tensor whose parts are `kernel` of stacked pieces, in the shape and dtype of the first tensor.

    Args:
        kernel: takes a piece of all tensors, `[tensors, elements]`, and returns `[elements]`; may be called for several
            pieces at the same time, in any order.
        tensors: tensors of one shape.
    """
    result = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
    _for_pieces(partial(_write, kernel), (*tensors, result))
    return result


def map_pieces_in_order(kernel: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Return the same, calling a `kernel` that draws random numbers for one piece after the other."""
    result = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
    for parts in _split((*tensors, result)):
        _write(kernel, parts)
    return result


def _write(kernel: Callable[[Tensor], Tensor], parts: Parts) -> None:
    parts[-1].copy_(kernel(_stack(parts[:-1])))


def _split(tensors: Sequence[Tensor]) -> Iterator[Parts]:
    return zip(*(tensor.reshape(-1).split(_PIECE) for tensor in tensors), strict=True)


def _stack(parts: Parts) -> Float[Tensor, "tensors elements"]:
    rows = torch.empty(len(parts), len(parts[0]), dtype=working_dtype(parts[0]))
    for row, part in zip(rows, parts, strict=True):
        row.copy_(part)
    return rows


def _for_pieces(work: Callable[[Parts], T], tensors: Sequence[Tensor]) -> list[T]:
    """Return what `work` returns for all pieces, in their order."""
    pieces = list(_split(tensors))
    threads = min(_threads, len(pieces) // _SHARE)
    if threads < 2:
        return list(map(work, pieces))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, pieces))


def row_blocks(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, Float[Tensor, "tensors rows columns"]]]:
    """Yield blocks of whole rows, which are everything but the first axis; a vector is one row."""
    dtype = working_dtype(tensors[0])
    matrices = [tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1) for tensor in tensors]
    height = max(1, _PIECE // max(1, matrices[0].shape[1]))
    for start in range(0, len(matrices[0]), height):
        rows = slice(start, start + height)
        yield rows, torch.stack([matrix[rows].to(dtype) for matrix in matrices])


def map_rows(kernel: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Return a tensor computed row by row: `kernel` maps `[tensors, rows, columns]` to `[rows, columns]`."""
    result = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
    matrix = result.flatten(1) if result.dim() > 1 else result.view(1, -1)
    for rows, block in row_blocks(tensors):
        matrix[rows] = kernel(block)
    return result


def order_statistics(
    kernel: Callable[[Tensor], Tensor], tensors: Sequence[Tensor], ranks: Sequence[int]
) -> list[float]:
    """Return the values at some places of the sorted entries of `kernel`, from 0, without sorting or storing them all.

    A sorted sample bounds each value; one pass counts the entries below the bounds and collects those within, among
    which the value is then selected. Source: Floyd and Rivest 1975, Communications of the ACM 18.

    Args:
        kernel: takes a piece of all tensors, `[tensors, elements]`, and returns `[elements]`, entry by entry.
        tensors: tensors of one shape.
        ranks: places in ascending order of the entries.
    """
    count = tensors[0].numel()
    step = -(-count // _SAMPLE)
    sample = (
        torch.cat([kernel(rows) for rows in stacked_pieces([t.reshape(-1)[::step] for t in tensors])]).sort().values
    )
    bounds = [_bounds(sample, rank / count) if step > 1 else (-torch.inf, torch.inf) for rank in ranks]
    values = _select(kernel, tensors, ranks, bounds)
    missed = [number for number, value in enumerate(values) if value is None]
    # A sample that misled, as of entries in a period, costs a pass that collects all entries.
    everything = _select(kernel, tensors, [ranks[number] for number in missed], [(-torch.inf, torch.inf)] * len(missed))
    rest = iter(everything)
    return [float(next(rest) if value is None else value) for value in values]  # type: ignore[arg-type]


def _bounds(sample: Tensor, part: float) -> tuple[float, float]:
    """Return values that enclose a quantile of what a sorted sample was drawn from, but for one draw in ten thousand."""
    place, margin = part * len(sample), 2 * len(sample) ** 0.5
    lower, upper = int(place - margin), int(place + margin) + 1
    low = float(sample[lower]) if lower >= 0 else -torch.inf
    return low, float(sample[upper]) if upper < len(sample) else torch.inf


def _select(
    kernel: Callable[[Tensor], Tensor],
    tensors: Sequence[Tensor],
    ranks: Sequence[int],
    bounds: Sequence[tuple[float, float]],
) -> list[float | None]:
    """Return the value at each rank, or None where it is not within its bounds."""

    def count(parts: Parts) -> list[tuple[int, NDArray[np.floating]]]:
        # By NumPy, which selects by booleans four times as fast.
        values = kernel(_stack(parts)).numpy()
        return [
            (int(np.count_nonzero(values < low)), values[(values >= low) & (values <= high)]) for low, high in bounds
        ]

    counted = _for_pieces(count, tensors) if ranks else []
    return [_at(rank, *zip(*pairs, strict=True)) for rank, *pairs in zip(ranks, *counted, strict=True)]


def _at(rank: int, below: Sequence[int], inside: Sequence[NDArray[np.floating]]) -> float | None:
    values = torch.from_numpy(np.concatenate(inside))
    place = rank - sum(below)
    return float(values.kthvalue(place + 1).values) if 0 <= place < len(values) else None
