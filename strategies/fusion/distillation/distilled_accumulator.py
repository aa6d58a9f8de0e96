"""The accumulator of a distillation: clients' models are kept on disk, and the sum of all is trained on their outputs."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge
from fedbasin.strategies.fusion.distillation.distil import Distillation, distil
from fedbasin.strategies.fusion.precisions import Precision
from fedbasin.strategies.fusion.spool import Spool, SpoolEntry
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.tasks.model_task import Task
from fedbasin.strategies.tensors.batches import Batch
from fedbasin.strategies.tensors.state import State, floating

# Every so many examples one is held out, by which passes are compared.
_HELD_OUT = 5

Tell: TypeAlias = Callable[[Distillation], None]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a fused model is trained on, and how.

    Attributes:
        module: runs the models; its tensors are replaced.
        batches: inputs that the model is trained on.
        held_out: inputs by which passes are compared.
        task: the task, which says what outputs mean.
        passes: number of passes over the batches.
        rate: learning rate of Adam.
    """

    module: nn.Module
    batches: Sequence[Batch]
    held_out: Sequence[Batch]
    task: Task
    passes: int
    rate: float

    def learn(self, student: State, teachers: Iterable[State]) -> Distillation:
        """Return the student as trained on the teachers' outputs; see `distil`."""
        return distil(self.module, student, teachers, self.batches, self.task, self.passes, self.rate, self.held_out)


def part_batches(batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return the part of batches that a model is trained on, and the fifth that is held out."""
    parts: tuple[list[Batch], list[Batch]] = [], []
    for batch in batches:
        is_held_out = torch.arange(len(batch.targets), device=batch.targets.device) % _HELD_OUT == _HELD_OUT - 1
        for part, rows in zip(parts, (~is_held_out, is_held_out), strict=True):
            if rows.any():
                part.append(batch.map(lambda tensor, rows=rows: tensor[rows]))  # type: ignore[misc]
    return parts


class DistilledAccumulator:
    """A sum of updates, and their models on disk, with the interface of `Accumulator`.

    Laws: one client's model stays what it is; the order of the clients does not matter. At one time the memory holds
    one client's model beside the sum.

    Attributes:
        undistilled: the last result of the sum without distillation, where distillation has changed it; None elsewhere.
    """

    def __init__(self, total: Accumulator, lesson: Lesson, spool: Spool, tell: Tell) -> None:
        """Begin without clients.

        Args:
            total: sum without clients, whose result is the student.
            lesson: inputs and numbers of the distillation.
            spool: an empty spool for the updates.
            tell: is told what the distillation has changed.
        """
        self._total, self._lesson, self._tell = total, lesson, tell
        self._spool = spool
        self._models: list[tuple[str, dict[str, SpoolEntry]]] = []
        self.undistilled: dict[str, Tensor] | None = None

    notes: tuple[str, ...] = ()

    @property
    def clients(self) -> int:
        """The number of updates."""
        return self._total.clients

    @property
    def blocks(self) -> dict[Block, tuple[Precision, Tensor]]:
        """The sum of the precisions of each block, and of their cross-moments."""
        return self._total.blocks

    def add(self, update: Update) -> None:
        """Add one client's update, and keep its model on disk.

        Raises:
            SpoolError: the disk is full.
        """
        digest = hashlib.blake2b(digest_size=16)
        entries = {}
        for name, tensor in floating(update.parameters).items():
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            entries[name] = self._spool.write(tensor)
        self._models.append((digest.hexdigest(), entries))
        self._total.add(update)

    def total(self) -> Accumulator:
        """Return the sum of the updates, without distillation."""
        return self._total

    def average(self, anchor: State) -> dict[str, Tensor]:
        """Return the mean by examples, without distillation."""
        return self._total.average(anchor)

    def finalize(self, anchor: State, ridge: Ridge | None = None) -> dict[str, Tensor]:
        """Return the distilled model in the anchor's dtypes; the sum's own result where training does not bring it closer.

        Raises:
            TaskError: the task has no divergence between outputs.
            ValueError: the divergence is not finite.
        """
        fused = self._total.finalize(anchor, ridge)
        if not self._models:
            return fused
        result = self._lesson.learn(fused, self._teachers())
        self._tell(result)
        self.undistilled = fused if result.after < result.before else None
        if self.undistilled is None:
            return fused
        return {
            name: result.state[name].to(tensor) if tensor.is_floating_point() else tensor
            for name, tensor in fused.items()
        }

    def _teachers(self) -> Iterator[State]:
        # In an order that does not depend on which client was first.
        for _, entries in sorted(self._models, key=lambda model: model[0]):
            yield {name: self._spool.read(entry) for name, entry in entries.items()}
