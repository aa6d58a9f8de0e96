"""Elementwise arithmetic on long tensors of any dtype, piece by piece, without temporaries of a tensor's length.

Each piece is converted to float32 (float64 where the first tensor is float64), computed on while it lies in the cache,
and rounded once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Elements of a piece: 1 MiB of float32.
_PIECE = 2**18

# Bits of a float32 by which values are counted first: sign, exponent and half of the mantissa.
_HIGH = 16


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


def order_statistics(pieces: Callable[[], Iterable[Tensor]], ranks: Sequence[int]) -> list[float]:
    """Return the values at some places of the sorted entries, from 0, without sorting or storing them.

    Values are compared as float32: the bits of one that is not negative are in its order. The upper half of the bits is
    counted in one pass, the lower half of the entries in the same bucket in a second.

    Args:
        pieces: yields the entries, none of them negative, and yields the same ones every time.
        ranks: places in ascending order of the entries.
    """
    counts = torch.zeros(2**_HIGH, dtype=torch.int64)
    for piece in pieces():
        counts += torch.bincount(_bits(piece) >> _HIGH, minlength=2**_HIGH)
    ends = counts.cumsum(0)
    buckets = [int(torch.searchsorted(ends, rank, right=True)) for rank in ranks]
    lows = {bucket: torch.zeros(2**_HIGH, dtype=torch.int64) for bucket in buckets}
    for piece in pieces():
        bits = _bits(piece)
        for bucket, histogram in lows.items():
            inside = bits[bits >> _HIGH == bucket] & (2**_HIGH - 1)
            histogram += torch.bincount(inside, minlength=2**_HIGH)
    values = []
    for rank, bucket in zip(ranks, buckets, strict=True):
        rest = rank - int(ends[bucket] - counts[bucket])
        low = int(torch.searchsorted(lows[bucket].cumsum(0), rest, right=True))
        values.append(float(torch.tensor((bucket << _HIGH) + low, dtype=torch.int32).view(torch.float32)))
    return values


def _bits(piece: Tensor) -> Int[Tensor, " elements"]:
    return piece.float().contiguous().view(torch.int32)
