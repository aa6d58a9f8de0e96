"""The check that statistics are finite, before they are encoded in a form in which that no longer shows."""

from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.tensors.parallel import is_finite


def check_statistic(block: Block, values: Tensor) -> Tensor:
    """Return a layer's statistic; raises a Refusal for one with NaN or infinite entries."""
    if not is_finite(values):
        raise Refusal(Outcome.non_finite, f"the statistic of {'+'.join(block)}")
    return values
