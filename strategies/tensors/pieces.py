"""Elementwise arithmetic on long tensors of any dtype, piece by piece, without temporaries of a tensor's length.

Each piece is converted to float32 (float64 where the first tensor is float64), computed on while it lies in the cache,
and rounded once.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

# Elements of a piece: 1 MiB of float32. Half of it costs a tenth more time, by torch's work for each call.
_PIECE = 2**18

# Entries of a sample that bounds a quantile, to within 1.6 percent of the entries.
_SAMPLE = 2**16


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a tensor is computed on."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def stacked_pieces(tensors: Sequence[Tensor]) -> Iterator[Float[Tensor, "tensors elements"]]:
    """Yield equal parts of tensors of one shape, stacked and converted."""
    dtype = working_dtype(tensors[0])
    for parts in zip(*(tensor.reshape(-1).split(_PIECE) for tensor in tensors), strict=True):
        rows = torch.empty(len(parts), len(parts[0]), dtype=dtype)
        for row, part in zip(rows, parts, strict=True):
            row.copy_(part)
        yield rows


def map_pieces(kernel: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Return a tensor whose parts are `kernel` of stacked pieces, in the shape and dtype of the first tensor.

    Args:
        kernel: takes a piece of all tensors, `[tensors, elements]`, and returns `[elements]`.
        tensors: tensors of one shape.
    """
    result = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
    start = 0
    for rows in stacked_pieces(tensors):
        result.view(-1)[start : start + rows.shape[1]] = kernel(rows)
        start += rows.shape[1]
    return result


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

    Raises:
        ValueError: some entries are not numbers.
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
    found = [next(rest) if value is None else value for value in values]
    if None in found:
        raise ValueError("some entries are not numbers, so they have no order")
    return [float(value) for value in found if value is not None]


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
    below = [0] * len(ranks)
    inside: list[list[NDArray[np.floating]]] = [[] for _ in ranks]
    for rows in stacked_pieces(tensors) if ranks else ():
        # By NumPy, which selects by booleans four times as fast.
        values = kernel(rows).numpy()
        for number, (low, high) in enumerate(bounds):
            below[number] += int(np.count_nonzero(values < low))
            inside[number].append(values[(values >= low) & (values <= high)])
    places = (torch.from_numpy(np.concatenate(parts)) for parts in inside)
    return [
        float(values.kthvalue(rank - less + 1).values) if 0 <= rank - less < len(values) else None
        for rank, less, values in zip(ranks, below, places, strict=True)
    ]
