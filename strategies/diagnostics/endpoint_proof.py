"""Endpoint proof: check at run time that alignment kept a client's function, by its loss before and after.

    error = |L_after(1) - L_before(1)| / max(L_before(1), L_after(1), floor)

A transform that forgets a tensor, or a symmetry made for another model, shows here first: both paths end in the same
client, so only rounding may separate their losses. Both start in the same unchanged anchor. A difference there comes
from the data itself (shuffled, augmented, sampled), and then nothing can be concluded.
"""

from dataclasses import dataclass
from enum import Enum

import torch

from fedbasin.strategies.diagnostics.barrier import Path

# Relative errors. Permuting entries reorders sums; rotating also rounds every weight once, which shows in half precision.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# Nats per example. The loss of a client that has memorised its data is nothing but rounding.
FLOOR = 1e-3


class EndpointVerdict(Enum):
    """A conclusion about a transform from the ends of two paths; the value is the advice."""

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
    """The relative differences between the losses of two paths at their ends.

    Attributes:
        client: relative error at t = 1, where the function must not have changed.
        anchor: relative error at t = 0, the control: nothing was changed there.
        tolerance: largest error that rounding explains.
    """

    client: float
    anchor: float
    tolerance: float

    @property
    def verdict(self) -> EndpointVerdict:
        """The conclusion, which is undecided whenever the control fails."""
        if self.anchor > self.tolerance:
            return EndpointVerdict.undecided
        return EndpointVerdict.holds if self.client <= self.tolerance else EndpointVerdict.broken


def endpoint_error(before: Path, after: Path, dtype: torch.dtype = torch.float32) -> EndpointError:
    """Compare one client's path before its alignment with the path after it.

    Paths are compared client by client, because errors of both signs would cancel in sums over clients.

    Args:
        before: anchor to client as trained.
        after: anchor to client as aligned, over the same data.
        dtype: type of the model's weights; decides the tolerance.

    Raises:
        ValueError: the paths are not over the same examples, or the type has no tolerance.
    """
    if before.examples != after.examples:
        raise ValueError(
            f"the path has {before.examples} examples before alignment and {after.examples} after; "
            "evaluate both on the same data"
        )
    if dtype not in TOLERANCES:
        raise ValueError(f"no tolerance for {dtype}; use one of {[str(d) for d in TOLERANCES]}")
    anchor, client = (_relative_error(before.mean_loss[end], after.mean_loss[end]) for end in (0, -1))
    return EndpointError(client, anchor, TOLERANCES[dtype])


def _relative_error(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), FLOOR)
