"""Parallel arithmetic on long tensors in pieces, without temporaries of a tensor's length.

    totals += weight * values          means = totals / weight          are all values finite?

This arithmetic is limited by memory bandwidth, of which one core uses nearly all. torch's own threads synchronise after
every operation, so one descheduled thread delays all of them; they are not used here. For operands of two dtypes torch
writes a converted copy of the whole tensor; here the copy is one piece that stays in the cache, and threads that
synchronise once share the pieces. New memory is allocated in huge pages, because the kernel clears it page by page.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedbasin.strategies.tensors.state import State

Pair: TypeAlias = tuple[Tensor, Tensor]
Work: TypeAlias = Callable[[Tensor, Tensor, Tensor], object]

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


def distances(tensors: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, float]:
    """Return the Euclidean distance of two tensors of one shape under each name; entries that are equal count as near."""
    with one_core():
        return {name: _distance(a, b) for name, a, b in tensors}


def _distance(a: Tensor, b: Tensor) -> float:
    square = 0.0
    for x, y in zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True):
        difference = x - y
        square += float(torch.dot(difference, difference))
    if math.isfinite(square):
        return math.sqrt(square)
    # The square overflowed, or both tensors are infinite somewhere by design.
    difference = torch.where(a == b, 0.0, a.double() - b.double())
    largest = float(difference.abs().max())
    return largest * float(torch.linalg.vector_norm(difference / largest))


@contextmanager
def one_core() -> Iterator[None]:
    """Limit torch to one core, for work that is bound by memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _for_pieces(pairs: list[Pair], work: Work) -> None:
    """Apply the work to all pieces of the pairs, with a buffer in the dtype of the pair's left tensor."""
    batches = list(_batches(pairs))
    threads = min(torch.get_num_threads(), len(batches))
    with one_core():
        if threads < 2:
            for batch in batches:
                _work_on(batch, work)
            return
        with ThreadPoolExecutor(threads) as pool:
            # The results are read so that a thread's exception is raised here.
            for _ in pool.map(_work_on, batches, repeat(work)):
                pass


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


def _work_on(batch: list[Pair], work: Work) -> None:
    buffers: dict[torch.dtype, Tensor] = {}
    for x, y in batch:
        if x.dtype not in buffers:
            buffers[x.dtype] = torch.empty(_PIECE, dtype=x.dtype)
        work(x, y, buffers[x.dtype][: len(x)])
