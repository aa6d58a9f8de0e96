"""Arithmetic over long tensors that leaves no temporary behind and waits for no thread.

    totals += weight * values          means = totals / weight          are all values finite?

Memory is the limit here, and one core nearly reaches it. torch's threads meet after every operation, so
that all of them wait whenever the machine gives one a rest: here they are not used. Where two dtypes
meet, torch first writes a converted copy of the whole tensor: here the copy is as long as a chunk that
stays in the cache, and threads that meet only once share the work. Fresh memory is taken in huge pages,
because the kernel clears it page by page.
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

# Elements that are converted at a time.
_CHUNK = 2**18

# Elements that a thread takes at a time.
_SHARE = 2**22


def zeros(like: State, dtype: torch.dtype) -> dict[str, Tensor]:
    """A zero of this dtype for each tensor; they lie side by side in one piece of memory."""
    sizes = [tensor.numel() for tensor in like.values()]
    # NumPy asks for huge pages where torch does not. One element too many: no view is taken of nothing.
    memory = np.zeros((sum(sizes) + 1) * dtype.itemsize, np.uint8)
    parts = torch.from_numpy(memory).view(dtype)[:-1].split(sizes) if sizes else ()
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def add_scaled(pairs: Iterable[Pair], weight: float) -> None:
    """`total += weight * value` for each pair, in the total's dtype; totals are contiguous."""

    def add(total: Tensor, value: Tensor, buffer: Tensor) -> None:
        total.add_(buffer.copy_(value), alpha=weight)

    mixed = []
    with one_core():
        for total, value in pairs:
            if total.dtype == value.dtype:
                total.add_(value, alpha=weight)
            else:
                mixed.append((total, value))
    _by_chunks(mixed, add)


def divided(totals: State, weight: float, like: State) -> dict[str, Tensor]:
    """`total / weight` for each tensor, in the total's dtype, then rounded once to that of `like`."""

    def divide(total: Tensor, mean: Tensor, buffer: Tensor) -> None:
        mean.copy_(torch.div(total, weight, out=buffer))

    means: dict[str, Tensor] = {}
    for dtype in {like[name].dtype for name in totals}:
        means |= zeros({n: t for n, t in totals.items() if like[n].dtype == dtype}, dtype)
    _by_chunks([(total, means[name]) for name, total in totals.items()], divide)
    return means


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is infinite or not a number; many tensors are best asked on `one_core`."""
    # A sum instead of a mask as large as the tensor: it is not finite if any entry is not. A finite
    # tensor whose sum overflows is looked at entry by entry.
    total = tensor.sum(dtype=torch.float32).item()
    return math.isfinite(total) or bool(tensor.isfinite().all())


@contextmanager
def one_core() -> Iterator[None]:
    """Keep torch on one core, for work that waits for memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _by_chunks(pairs: list[Pair], work: Work) -> None:
    """Do the work on every chunk of the pairs, with a buffer of the first one's dtype."""
    shares = list(_shares(pairs))
    threads = min(torch.get_num_threads(), len(shares))
    with one_core():
        if threads < 2:
            for share in shares:
                _take(share, work)
            return
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(_take, shares, repeat(work)):
                pass


def _shares(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """The pairs in chunks, as many together as one thread takes at a time."""
    share: list[Pair] = []
    elements = 0
    for pair in pairs:
        first, second = (tensor.detach().reshape(-1) for tensor in pair)
        for start in range(0, len(first), _CHUNK):
            share.append((first[start : start + _CHUNK], second[start : start + _CHUNK]))
            elements += len(share[-1][0])
            if elements >= _SHARE:
                yield share
                share, elements = [], 0
    if share:
        yield share


def _take(share: list[Pair], work: Work) -> None:
    buffers: dict[torch.dtype, Tensor] = {}
    for first, second in share:
        if first.dtype not in buffers:
            buffers[first.dtype] = torch.empty(_CHUNK, dtype=first.dtype)
        work(first, second, buffers[first.dtype][: len(first)])
