"""The part of a client's examples that no layer is fitted to, by which models are compared.

Whether an example is in that part follows from its own numbers, so that a loader that shuffles gives the same part at
every pass, and two copies of an example are on the same side. A loader that changes its examples at random, as image
augmentation does, gives other parts at every pass; such an app passes batches of its own. Only the app decides what it
trains on: where it trains on these examples too, the comparison favours the mean of the clients' models over one with
fitted layers.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbasin.strategies.tensors.batches import Batch, Batches, read_batches

# Examples of one client that a comparison reads at most, for each model.
MOST = 1000


@dataclass(frozen=True)
class DataPart:
    """The batches of one of the two parts.

    Attributes:
        batches: all batches.
        share: share of the examples that is held out.
        is_held_out: whether this is the part that is held out. The other part is all examples where it would be empty.
    """

    batches: Batches
    share: float
    is_held_out: bool

    def __iter__(self) -> Iterator[Batch]:
        """Yield each batch's examples of this part, on the CPU; of the held-out part no more than `MOST` examples."""
        examples = 0
        for batch in read_batches(self.batches, nn.Identity()):
            chosen = held_out(batch, self.share) == self.is_held_out
            if self.is_held_out:
                chosen &= chosen.cumsum(0) <= MOST - examples
            examples += int(chosen.sum())
            if chosen.any():
                yield batch.map(lambda tensor, rows=chosen: tensor[rows])  # type: ignore[misc]
            if self.is_held_out and examples >= MOST:
                return
        if not (examples or self.is_held_out):
            yield from read_batches(self.batches, nn.Identity())


def held_out(batch: Batch, share: float) -> Tensor:
    """Return which examples of a batch are held out, `[batch]`.

    Args:
        batch: the batch, on the CPU.
        share: share of all examples that is held out, on average.
    """
    inputs = [batch.inputs] if isinstance(batch.inputs, Tensor) else list(batch.inputs.values())
    sums = [0] * len(batch.targets)
    for tensor in (*inputs, batch.targets):
        rows = tensor.detach().reshape(len(sums), -1).contiguous().view(torch.uint8).numpy()
        sums = [zlib.crc32(row, value) for row, value in zip(rows, sums, strict=True)]
    return torch.tensor([value < share * 2**32 for value in sums], dtype=torch.bool)
