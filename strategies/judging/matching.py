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
    except Refusal:
        raise
    # No other RuntimeError: learned matching runs the app's own model, whose errors have another remedy.
    except (ValueError, ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        detail = f"its weights cannot be matched to the anchor's: {error}"
        raise Refusal(Outcome.out_of_line, detail) from error
