"""The merge itself: tensors are read, merged and written by a few threads, within a bound of memory.

While one thread computes, another reads and a third writes, so the disk is not idle.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fedbasin.server.files.merge.layout import TensorWriter
from fedbasin.server.files.merge.plan import PlannedTensor, TensorOrigin
from fedbasin.server.files.reading import ModelError
from fedbasin.strategies.tensors.parallel import is_finite, one_core
from fedbasin.strategies.tensors.state import State

States = Mapping[Path, State]

# Bytes of tensors that are in memory at one time, unless a single one needs more.
_MEMORY = 3 * 2**28

# Names of counters, in which models that were trained for different times differ.
_COUNTER = "num_batches_tracked"


def merge_tensors(
    plan: Sequence[PlannedTensor], states: States, writer: TensorWriter, on_write: Callable[[int], None]
) -> None:
    """Merge and write all tensors.

    Args:
        plan: the tensors.
        states: the models' tensors, which are read when they are needed, by several threads.
        writer: files to write to.
        on_write: called with the size in bytes of each tensor that was written.

    Raises:
        ModelError: a tensor cannot be read or merged, or its result is not finite; names it.
    """
    check_copies(plan, states)

    def work(tensor: PlannedTensor) -> int:
        writer.write(tensor.name, merge_tensor(tensor, states))
        return tensor.nbytes

    threads = torch.get_num_threads() + 1
    with one_core(), _cancelling(ThreadPoolExecutor(threads)) as pool:
        running: dict[Future[int], int] = {}
        for tensor in plan:
            cost = tensor.nbytes * (len(tensor.origins) + 1)
            while running and (len(running) > threads or sum(running.values()) + cost > _MEMORY):
                _collect(running, on_write)
            running[pool.submit(work, tensor)] = cost
        while running:
            _collect(running, on_write)


def merge_tensor(tensor: PlannedTensor, states: States) -> Tensor:
    """Return one tensor of the result.

    Raises:
        ModelError: it cannot be read or merged, or is not finite.
    """
    anchor = None if tensor.anchor is None else _tensor_of(tensor.anchor, states)
    sources = [_tensor_of(source, states) for source in tensor.sources]
    if tensor.rule is None:
        return sources[0]
    try:
        # Wide enough that a difference of dtypes, or to a narrower result, rounds once.
        merged = tensor.rule.function(*_promote(anchor, sources, tensor.dtype), tensor.weights, **tensor.arguments)
    except (ValueError, RuntimeError) as error:
        if place := _not_finite(tensor, anchor, sources):
            raise ModelError(f"{tensor.name}: is infinite or not a number {place}") from error
        raise ModelError(f"{tensor.name}: {tensor.rule.name}: {error}") from error
    result: Tensor = merged.to(tensor.dtype)
    if not is_finite(result):
        place = _not_finite(tensor, anchor, sources)
        advice = f"after merging in {tensor.dtype}; choose a wider dtype or smaller weights"
        raise ModelError(f"{tensor.name}: is infinite or not a number {place or advice}")
    return result


def check_copies(plan: Sequence[PlannedTensor], states: States) -> None:
    """Refuse integers and other tensors that are copied and not merged, if they differ between the models.

    Raises:
        ModelError: names the tensor and the models.
    """
    for tensor in plan:
        if tensor.rule is None and not tensor.name.endswith(_COUNTER):
            reference, *copies = (_tensor_of(origin, states) for origin in tensor.origins)
            for origin, copy in zip(tensor.origins[1:], copies, strict=True):
                if not torch.equal(reference, copy):
                    raise ModelError(
                        f"{tensor.name}: holds {reference.dtype}, which is not merged, and differs between "
                        f"{tensor.origins[0].model} and {origin.model}; convert the models to floating point first"
                    )


def _promote(
    anchor: Tensor | None, sources: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the tensors with the first, whose dtype the result has, in a dtype that holds all of them."""
    tensors = [*sources] if anchor is None else [anchor, *sources]
    if len({dtype, *(tensor.dtype for tensor in tensors)}) > 1:
        wide = torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors} else torch.float32
        tensors[0] = tensors[0].to(wide)
    return (None, tensors) if anchor is None else (tensors[0], tensors[1:])


def _tensor_of(origin: TensorOrigin, states: States) -> Tensor:
    return states[origin.model][origin.name]


def _not_finite(tensor: PlannedTensor, anchor: Tensor | None, sources: Sequence[Tensor]) -> str:
    """Return which model has entries that are not finite; nothing if none has."""
    tensors = sources if anchor is None else (anchor, *sources)
    for origin, value in zip(tensor.origins, tensors, strict=True):
        if not is_finite(value):
            return f"in {origin.model}; leave this model out"
    return ""


def _collect(running: dict[Future[int], int], on_write: Callable[[int], None]) -> None:
    """Wait for the next tensor to be written; raises what its thread raised."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        del running[future]
        on_write(future.result())


@contextmanager
def _cancelling(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool that drops what has not begun when the context ends by an exception."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
