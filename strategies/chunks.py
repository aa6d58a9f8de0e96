"""Arithmetic over long tensors, by chunks that fit a core's cache, shared among threads.

    totals += weight * values          means = totals / weight          are all values finite?

Two things make torch slow at this. Where two dtypes meet, it first writes a converted copy of the whole
tensor to memory; here the copy is as long as a chunk. And its threads meet after every operation, so that
all wait whenever the machine gives one of them a rest; here they meet once.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from fedbasin.strategies.state import State

T = TypeVar("T")

# Elements of one operation: with more, torch starts threads of its own.
_CHUNK = 32_768

# Elements that one thread takes at a time.
_SHARE = 128 * _CHUNK


def add_scaled(pairs: Iterable[tuple[Tensor, Tensor]], weight: float) -> None:
    """`total += weight * value` for each pair, in the total's dtype; totals are contiguous."""

    def add(total: Tensor, value: Tensor) -> None:
        for sums, values in _cut(_CHUNK, total, value):
            sums.add_(values.to(sums.dtype), alpha=weight)

    _share(add, *zip(*pairs, strict=True))


def divided(totals: State, weight: float, like: State) -> dict[str, Tensor]:
    """`total / weight` for each tensor, in the total's dtype, then rounded to that of `like`."""
    means = {name: torch.empty_like(t, dtype=like[name].dtype) for name, t in totals.items()}

    def divide(total: Tensor, mean: Tensor) -> None:
        for sums, out in _cut(_CHUNK, total, mean):
            out.copy_(sums / weight)

    _share(divide, list(totals.values()), list(means.values()))
    return means


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is infinite or not a number."""
    return all(_share(_has_finite_sums, [tensor]))


def _has_finite_sums(tensor: Tensor) -> bool:
    # Sums instead of a mask as large as the tensor: one is not finite if any of its entries is not.
    sums = [values.sum(dtype=torch.float32) for (values,) in _cut(_CHUNK, tensor)]
    # Finite entries whose sum overflows are looked at one by one.
    return bool(torch.stack(sums).isfinite().all()) or bool(tensor.isfinite().all())


def _share(work: Callable[..., T], *columns: Iterable[Tensor]) -> list[T]:
    """What the work returns for each share of the tensors, which stand side by side in columns."""
    shares = [share for row in zip(*columns, strict=True) for share in _cut(_SHARE, *row)]
    threads = min(torch.get_num_threads(), len(shares))
    if threads < 2:
        return [work(*share) for share in shares]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda share: work(*share), shares))


def _cut(length: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of this length, side by side, without their shape."""
    return zip(*(tensor.detach().reshape(-1).split(length) for tensor in tensors), strict=True)
