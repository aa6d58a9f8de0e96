"""Parallel arithmetic on long tensors in pieces, without temporaries of a tensor's length.

    totals += weight * values      means = totals / weight      ||a - b||      are all values finite?

This arithmetic is limited by memory bandwidth, of which one core uses nearly all. torch's own threads synchronise after
every operation, so one descheduled thread delays all of them; they are not used here. For operands of two dtypes torch
writes a converted copy of the whole tensor; here the copy is one piece that stays in the cache, and threads that
synchronise once share the pieces. New memory is allocated in huge pages, because the kernel clears it page by page.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice, repeat
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedbasin.strategies.tensors.pieces import working_dtype
from fedbasin.strategies.tensors.state import State

T = TypeVar("T")
Pair: TypeAlias = tuple[Tensor, Tensor]
Work: TypeAlias = Callable[[Tensor, Tensor, Tensor], T]

# Elements of a piece, which is converted at a time.
_PIECE = 2**18

# Elements of a batch of pieces, which one thread works on at a time.
_BATCH = 2**22


def zeros(like: State, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return zeros of a dtype in the shape of each tensor, adjacent in one allocation."""
    sizes = [tensor.numel() for tensor in like.values()]
    # NumPy asks for huge pages and torch does not. One element more, because an empty array has no view of a dtype.
    memory = np.zeros((sum(sizes) + 1) * dtype.itemsize, np.uint8)
    parts = torch.from_numpy(memory).view(dtype)[:-1].split(sizes) if sizes else ()
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def add_scaled(pairs: Iterable[Pair], weight: float) -> None:
    """Compute `total += weight * value` in place for each pair, in the total's dtype; totals are contiguous."""

    def add(total: Tensor, value: Tensor, buffer: Tensor) -> None:
        total.add_(buffer.copy_(value), alpha=weight)

    mixed = []
    with one_core():
        for total, value in pairs:
            if total.dtype == value.dtype:
                total.add_(value, alpha=weight)
            else:
                mixed.append((total, value))
    _for_pieces(mixed, add)


def divide(totals: State, weight: float, like: State) -> dict[str, Tensor]:
    """Return `total / weight` of each tensor, computed in its dtype and then rounded once to the dtype in `like`."""

    def divide(total: Tensor, mean: Tensor, buffer: Tensor) -> None:
        mean.copy_(torch.div(total, weight, out=buffer))

    means: dict[str, Tensor] = {}
    for dtype in {like[name].dtype for name in totals}:
        means |= zeros({n: t for n, t in totals.items() if like[n].dtype == dtype}, dtype)
    _for_pieces([(total, means[name]) for name, total in totals.items()], divide)
    return means


def is_finite(tensor: Tensor) -> bool:
    """Return True if no entry is infinite or NaN; use `one_core` around a loop over many tensors."""
    # A sum needs no mask as large as the tensor, and is not finite if any entry is not. Only if the sum overflows are
    # the entries checked one by one.
    total = tensor.sum(dtype=torch.float32).item()
    return math.isfinite(total) or bool(tensor.isfinite().all())


def distances(tensors: Mapping[str, Pair]) -> dict[str, float]:
    """Return the Euclidean distance of two tensors of one shape under each name; entries that are equal count as near.

    One pass over both. A distance is finite only if all entries that differ are.
    """

    def square(a: Tensor, b: Tensor, buffer: Tensor) -> float:
        difference = buffer.copy_(a).sub_(b) if a.dtype != buffer.dtype else torch.sub(a, b, out=buffer)
        return float(torch.dot(difference, difference))

    squares = iter(_for_pieces(list(tensors.values()), square))
    return {name: _distance(a, b, math.fsum(islice(squares, _pieces(a)))) for name, (a, b) in tensors.items()}


def _distance(a: Tensor, b: Tensor, square: float) -> float:
    if math.isfinite(square):
        return math.sqrt(square)
    # The square overflowed, or both tensors are infinite somewhere by design.
    difference = torch.where(a == b, 0.0, a.double() - b.double())
    largest = float(difference.abs().max())
    return largest * float(torch.linalg.vector_norm(difference / largest)) if largest else 0.0


@contextmanager
def one_core() -> Iterator[None]:
    """Limit torch to one core, for work that is bound by memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _for_pieces(pairs: list[Pair], work: Work[T]) -> list[T]:
    """Return the work's results for all pieces of the pairs; its buffer is in the left tensor's working dtype."""
    batches = list(_batches(pairs))
    threads = min(torch.get_num_threads(), len(batches))
    with one_core():
        if threads < 2:
            return [result for batch in batches for result in _work_on(batch, work)]
        with ThreadPoolExecutor(threads) as pool:
            return [result for results in pool.map(_work_on, batches, repeat(work)) for result in results]


def _pieces(tensor: Tensor) -> int:
    return max(1, -(-tensor.numel() // _PIECE))


def _batches(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Yield the pairs in pieces, in batches of at least `_BATCH` elements."""
    batch: list[Pair] = []
    elements = 0
    for pair in pairs:
        flat = (tensor.detach().reshape(-1) for tensor in pair)
        for piece in zip(*(tensor.split(_PIECE) for tensor in flat), strict=True):
            batch.append(piece)
            elements += len(piece[0])
            if elements >= _BATCH:
                yield batch
                batch, elements = [], 0
    if batch:
        yield batch


def _work_on(batch: list[Pair], work: Work[T]) -> list[T]:
    buffers: dict[torch.dtype, Tensor] = {}
    results, longest = [], max(len(x) for x, _ in batch)
    for x, y in batch:
        dtype = working_dtype(x)
        if dtype not in buffers:
            buffers[dtype] = torch.empty(longest, dtype=dtype)
        results.append(work(x, y, buffers[dtype][: len(x)]))
    return results
