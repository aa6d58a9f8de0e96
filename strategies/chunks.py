"""Arithmetic over long tensors that leaves no temporary behind and waits for no thread.

    totals += weight * values          means = totals / weight          are all values finite?

Memory is the limit here, and one core nearly reaches it. torch's threads meet after every operation, so
that all of them wait whenever the machine gives one a rest: here they are not used. Where two dtypes
meet, torch first writes a converted copy of the whole tensor: here the copy is as long as a chunk that
stays in the cache. And fresh memory is taken in huge pages, because the kernel clears it page by page.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedbasin.strategies.state import State

Pair: TypeAlias = tuple[Tensor, Tensor]

# Elements that are converted at a time.
_CHUNK = 2**18


def zeros(like: State, dtype: torch.dtype) -> dict[str, Tensor]:
    """A zero of this dtype for each tensor; they lie side by side in one piece of memory."""
    sizes = [tensor.numel() for tensor in like.values()]
    flat = _memory(sum(sizes), dtype).split(sizes) if sizes else ()
    return {name: part.view(like[name].shape) for name, part in zip(like, flat, strict=True)}


def add_scaled(pairs: Iterable[Pair], weight: float) -> None:
    """`total += weight * value` for each pair, in the total's dtype; totals are contiguous."""
    mixed = []
    with one_core():
        for total, value in pairs:
            if total.dtype == value.dtype:
                total.add_(value, alpha=weight)
            else:
                mixed.append((total, value))
        for sums, values, buffer in _chunks(mixed):
            sums.add_(buffer.copy_(values), alpha=weight)


def divided(totals: State, weight: float, like: State) -> dict[str, Tensor]:
    """`total / weight` for each tensor, in the total's dtype, then rounded once to that of `like`."""
    means = {n: _memory(t.numel(), like[n].dtype).view(t.shape) for n, t in totals.items()}
    mixed = []
    with one_core():
        for name, total in totals.items():
            if total.dtype == means[name].dtype:
                torch.div(total, weight, out=means[name])
            else:
                mixed.append((total, means[name]))
        for sums, rounded, buffer in _chunks(mixed):
            rounded.copy_(torch.div(sums, weight, out=buffer))
    return means


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is infinite or not a number."""
    with one_core():
        # A sum instead of a mask as large as the tensor: it is not finite if any entry is not. A finite
        # tensor whose sum overflows is looked at entry by entry.
        total = float(tensor.sum(dtype=torch.float32))
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


def _chunks(pairs: Iterable[Pair]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each pair a chunk at a time, and a buffer of the first one's dtype that is as long."""
    buffer = torch.empty(0)
    for pair in pairs:
        first, second = (tensor.detach().reshape(-1) for tensor in pair)
        if buffer.dtype != first.dtype or not len(buffer):
            buffer = torch.empty(_CHUNK, dtype=first.dtype)
        for start in range(0, len(first), _CHUNK):
            part = first[start : start + _CHUNK]
            yield part, second[start : start + _CHUNK], buffer[: len(part)]


def _memory(elements: int, dtype: torch.dtype) -> Tensor:
    # NumPy asks for huge pages where torch does not. One element too many: no view is taken of nothing.
    memory = np.zeros((elements + 1) * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype)[:elements]
