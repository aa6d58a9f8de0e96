"""The proof, at run time, that an alignment changed no function: the client's loss before and after is the same.

    error = |L_after(1) - L_before(1)| / max(L_before(1), L_after(1), floor)

A transform that forgets a tensor, or a symmetry made for another model, shows here first: both paths end in the
same client, so only rounding may separate their losses. Both start in the same anchor, untouched, so what
separates them there is the data itself (shuffled away, augmented, sampled), and then nothing can be said.
"""

from dataclasses import dataclass
from enum import Enum

import torch

from fedbasin.strategies.diagnostics.barrier import Path

# Relative. Moving entries reorders sums; rotating also rounds every weight once, which half precision shows.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}

# Nats per example. A client that has learnt its data by heart has a loss that is rounding and nothing else.
FLOOR = 1e-3


class Verdict(Enum):
    """What the ends of two paths say about a transform; the value is the advice."""

    holds = "the aligned model is the same function on this data"
    broken = (
        "the aligned model is another function: the symmetry does not fit the model; "
        "run fedbasin.strategies.symmetry.check on it and leave this client unaligned until it passes"
    )
    undecided = (
        "the anchor's own loss differs between the two passes, so the data is not the same each time; "
        "evaluate without augmentation or sampling"
    )


@dataclass(frozen=True)
class EndpointError:
    """How much the losses of two paths differ at their ends.

    Attributes:
        client: relative error at t = 1, where the function must not have changed.
        anchor: relative error at t = 0, where nothing was changed: the control.
        tolerance: above which an error is not rounding.
    """

    client: float
    anchor: float
    tolerance: float

    @property
    def verdict(self) -> Verdict:
        """The control is asked first."""
        if self.anchor > self.tolerance:
            return Verdict.undecided
        return Verdict.holds if self.client <= self.tolerance else Verdict.broken


def endpoint_error(before: Path, after: Path, dtype: torch.dtype = torch.float32) -> EndpointError:
    """Compare one client's path before its alignment with the path after it.

    Compare client by client: in sums over clients errors of both signs cancel.

    Args:
        before: anchor to client as trained.
        after: anchor to client as aligned, over the same data.
        dtype: of the model's weights; decides the tolerance.

    Raises:
        ValueError: The paths are not over the same examples, or the type has no tolerance.
    """
    if before.examples != after.examples:
        raise ValueError(
            f"the path has {before.examples} examples before alignment and {after.examples} after; "
            "evaluate both on the same data"
        )
    if dtype not in TOLERANCES:
        raise ValueError(f"no tolerance for {dtype}; use one of {[str(d) for d in TOLERANCES]}")
    first, last = (_relative(before.mean_loss[end], after.mean_loss[end]) for end in (0, -1))
    return EndpointError(client=last, anchor=first, tolerance=TOLERANCES[dtype])


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), FLOOR)
