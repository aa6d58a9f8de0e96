"""The refusal of a model that no matcher can align."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedbasin.strategies.judging.outcomes import Outcome, Refusal


@contextmanager
def refusing_what_cannot_be_matched() -> Iterator[None]:
    """Turn a matcher's error into a refusal: products of finite weights may be too large for any number.

    Raises:
        Refusal: the matcher failed; its detail is the matcher's error.
    """
    try:
        yield
    except (Refusal, torch.OutOfMemoryError):
        raise
    except (ValueError, ArithmeticError, RuntimeError) as error:
        detail = f"its weights cannot be matched to the anchor's: {error}"
        raise Refusal(Outcome.out_of_line, detail) from error
