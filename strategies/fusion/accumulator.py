"""The running sum of a round: replies are folded one by one, and memory does not grow with clients.

    sum_k Lambda_k        sum_k Lambda_k . theta_k

A commutative monoid: `Accumulator.zero`, `lift`, `merge`, `finalize`. Sums may be merged in a tree or split by
tensor. The regulariser is one more client: the mean (or the anchor) with an isotropic precision, so there
is no singular sum.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.batchnorm import second_moments, variances
from fedbasin.strategies.fusion.precisions import Precision, added, common
from fedbasin.strategies.fusion.update import Update, join, split, stored
from fedbasin.strategies.tensors.parallel import add_scaled, divided, zeros
from fedbasin.strategies.tensors.state import State, floating


@dataclass(frozen=True)
class Ridge:
    """The regulariser of a fused block: one more client, that knows every weight equally well.

    Attributes:
        strength: its precision, relative to the mean diagonal of the clients' sum.
        target: whose weights it holds: the clients' weighted mean, or the anchor.
    """

    strength: float = 1e-3
    target: Literal["mean", "anchor"] = "mean"


@dataclass(eq=False)
class Accumulator:
    """The sums over the clients so far. The one mutable value of the strategies.

    Laws: `merge` is associative and commutative up to rounding, with `zero` neutral; K equal updates give
    that update; no updates give the anchor; `finalize(g . u) = g . finalize(u)` where statistics can follow.

    Attributes:
        mean: `sum_k n_k theta_k` of every floating tensor; of second moments in the place of running variances.
        examples: `sum_k n_k`.
        blocks: for each block `(sum Lambda, sum Lambda . theta)`; blocks whose precisions every client had in common
            have their sum in common.
        clients: number of updates.
    """

    mean: dict[str, Tensor]
    examples: float = 0.0
    blocks: dict[Block, tuple[Precision, Tensor]] = field(default_factory=dict)
    clients: int = 0

    @classmethod
    def zero(cls, anchor: State, dtype: torch.dtype = torch.float64) -> "Accumulator":
        """The empty sum over the anchor's floating tensors.

        Args:
            anchor: gives names and shapes.
            dtype: of the sums. In float64 the result, rounded to float32, does not depend on the order
                of arrival; float32 is faster and does.
        """
        return cls(zeros(floating(anchor), dtype))

    def add(self, update: Update) -> None:
        """Add one client, in place; the update is not kept."""
        parameters = second_moments(update.parameters)
        pairs = ((total, parameters[name]) for name, total in self.mean.items())
        add_scaled(pairs, update.examples)
        self._add(update.precisions, partial(_moment, update))
        self.examples += update.examples
        self.clients += 1

    def merge(self, other: "Accumulator") -> None:
        """Add another accumulator's clients, in place."""
        for name, total in self.mean.items():
            total += other.mean[name]
        self._add(other.precisions, lambda block: other.blocks[block][1])
        self.examples += other.examples
        self.clients += other.clients

    def finalize(self, anchor: State, ridge: Ridge | None = None) -> dict[str, Tensor]:
        """The fused model, in the anchor's dtypes; what cannot be averaged stays as the anchor has it."""
        if not self.clients:
            return dict(anchor)
        fused = {**anchor, **divided(self.mean, self.examples, anchor)}
        for name, variance in variances(self.mean, self.examples):
            fused[name] = variance.to(anchor[name].dtype)
        for blocks in common(self.precisions):
            solution = self._solution(blocks, anchor, ridge)
            for block, part in zip(blocks, solution.split(self._lengths(blocks)), strict=True):
                fused.update(split(block, part, anchor))
        return fused

    @property
    def precisions(self) -> dict[Block, Precision]:
        """The sums of the precisions."""
        return {block: precision for block, (precision, _) in self.blocks.items()}

    def _add(
        self, precisions: Mapping[Block, Precision], moment: Callable[[Block], Tensor]
    ) -> None:
        for blocks, total in added(self._known, precisions):
            for block in blocks:
                # A copy: the update is let go, and with it the reply that it may be a view of.
                before, coming = self.blocks.get(block), moment(block)
                own = coming.clone() if before is None else before[1].add_(coming)
                self.blocks[block] = total, own

    def _known(self, block: Block) -> Precision | None:
        return self.blocks[block][0] if block in self.blocks else None

    def _lengths(self, blocks: Sequence[Block]) -> list[int]:
        return [len(self.blocks[block][1]) for block in blocks]

    def _solution(self, blocks: Sequence[Block], anchor: State, ridge: Ridge | None) -> Tensor:
        """Of blocks with one precision in common, one below the other."""
        precision = self.blocks[blocks[0]][0]
        moment = _stacked([self.blocks[block][1] for block in blocks])
        if ridge is None:
            return precision.solve(moment)
        prior = precision.isotropic(ridge.strength)
        targets = (self._target(block, anchor, ridge) for block in blocks)
        target = _stacked([target.to(moment.dtype) for target in targets])
        if not prior.weight:
            # Nobody knows anything of the blocks, as of a layer that no example reaches.
            return target
        return (precision + prior).solve(moment + prior.weigh(target))

    def _target(self, block: Block, anchor: State, ridge: Ridge) -> Tensor:
        if ridge.target == "anchor":
            return join(block, anchor)
        return join(block, {name: self.mean[name] / self.examples for name in stored(block)})


def _moment(update: Update, block: Block) -> Tensor:
    if block in update.moments:
        return update.moments[block]
    return update.precisions[block].weigh(join(block, update.parameters).double())


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def fuse(anchor: State, updates: Iterable[Update], ridge: Ridge | None = None) -> dict[str, Tensor]:
    """All of a round's arithmetic in one call, for updates that are at hand."""
    accumulator = Accumulator.zero(anchor)
    for update in updates:
        accumulator.add(update)
    return accumulator.finalize(anchor, ridge)
