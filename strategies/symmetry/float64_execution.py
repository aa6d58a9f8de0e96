"""Execution of a model in float64 throughout, so that errors below float32 can be seen.

Published models compute norms, rotary angles and softmax in float32 whatever the dtype of their parameters, which would
hide every error below 1e-7.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_DOUBLES = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    torch.complex64: torch.complex128,
}


class TrueDouble(TorchDispatchMode):
    """A mode in which every operator that would return a narrower floating type returns float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator with the dtypes among its arguments replaced."""
        kwargs = {name: _doubled(value) for name, value in (kwargs or {}).items()}
        return func(*map(_doubled, args), **kwargs)


def _doubled(argument: Any) -> Any:
    return _DOUBLES.get(argument, argument) if isinstance(argument, torch.dtype) else argument


@contextmanager
def double_by_default() -> Iterator[None]:
    """Let tensors that a model creates be float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def true_double() -> Iterator[None]:
    """Run everything in float64."""
    with double_by_default(), TrueDouble():
        yield
