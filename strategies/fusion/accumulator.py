"""The accumulator of a round: sums over clients to which updates are added one by one, in constant memory.

    sum_k Lambda_k        sum_k Lambda_k . theta_k

Accumulators form a commutative monoid: `zero` and `merge`. So sums can be merged in a tree or split by tensor. The
regulariser acts as one more client that has the mean (or the anchor) with an isotropic precision; it makes the sum
positive definite.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedbasin.proto.layer_graph import Block
from fedbasin.strategies.fusion.batchnorm import with_spread
from fedbasin.strategies.fusion.precisions import Precision, common, sum_precisions
from fedbasin.strategies.fusion.tally import Tally
from fedbasin.strategies.fusion.update import Update, join, split, tensor_names
from fedbasin.strategies.tensors.parallel import add_scaled, divide, zeros
from fedbasin.strategies.tensors.state import MEASURED, State, floating


@dataclass(frozen=True)
class Ridge:
    """A regulariser of a fused block: one more client with the same precision for every weight.

    Attributes:
        strength: precision, relative to the mean diagonal of the clients' sum.
        target: weights of that client: the clients' weighted mean, or the anchor.
    """

    strength: float = 1e-3
    target: Literal["mean", "anchor"] = "mean"


@dataclass(eq=False)
class Accumulator:
    """Sums over the clients of a round, which change in place.

    Laws: `merge` is associative and commutative up to rounding, with `zero` neutral; K equal updates give
    that update; no updates give the anchor; `finalize(g . u) = g . finalize(u)` for statistics that a transform g can
    act on.

    Attributes:
        mean: `sum_k n_k theta_k` of every floating tensor; running variances with the spread of the running means.
        examples: `sum_k n_k`.
        blocks: `(sum Lambda, sum Lambda . theta)` of each block; blocks that share their precision in every client
            share the sum.
        clients: number of updates.
        tallies: sums of the tensors that are not floating.
        notes: what became of each update beside the sum: nothing.
    """

    notes: ClassVar[tuple[str, ...]] = ()

    mean: dict[str, Tensor]
    examples: float = 0.0
    blocks: dict[Block, tuple[Precision, Tensor]] = field(default_factory=dict)
    clients: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)

    @classmethod
    def zero(cls, anchor: State, dtype: torch.dtype = torch.float64) -> "Accumulator":
        """Return an accumulator without clients for the anchor's floating tensors.

        Args:
            anchor: state that gives names and shapes.
            dtype: element type of the sums. A float64 sum that is rounded to float32 does not depend on the order of
                arrival; float32 is faster and does depend on it.
        """
        summed = floating(anchor)
        measured = {name: tensor for name, tensor in summed.items() if name.endswith(MEASURED)}
        learned = {name: tensor for name, tensor in summed.items() if name not in measured}
        # Statistics of a layer that is far from zero have more digits than float32 holds.
        return cls(zeros(learned, dtype) | zeros(measured, torch.float64))

    def add(self, update: Update) -> None:
        """Add one client's update in place, without keeping a reference to it."""
        parameters = {name: update.parameters[name] for name in self.mean}
        parameters |= with_spread(parameters, update.examples, self.mean, self.examples)
        add_scaled(((total, parameters[name]) for name, total in self.mean.items()), update.examples)
        self._tally(
            {
                name: Tally.of(tensor, update.examples)
                for name, tensor in update.parameters.items()
                if not tensor.is_floating_point()
            }
        )
        self._add(update.precisions, partial(_cross_moment, update))
        self.examples += update.examples
        self.clients += 1

    def merge(self, other: "Accumulator") -> None:
        """Add the clients of another accumulator in place."""
        if other.clients:
            means = {name: total / other.examples for name, total in other.mean.items() if name.endswith(MEASURED)}
            spread = with_spread(means, other.examples, self.mean, self.examples)
            for name, total in self.mean.items():
                total += spread[name] * other.examples if name in spread else other.mean[name]
        self._tally(other.tallies)
        self._add(other.precisions, lambda block: other.blocks[block][1])
        self.examples += other.examples
        self.clients += other.clients

    def finalize(self, anchor: State, ridge: Ridge | None = None) -> dict[str, Tensor]:
        """Return the fused model in the anchor's dtypes; tensors that no client sent are the anchor's.

        Raises:
            SingularSumError: a block's sum is singular, and there is no ridge.
        """
        fused = self.average(anchor)
        if not self.clients:
            return fused
        # Blocks that share a matrix are solved together, with one factorisation.
        for blocks in common(self.precisions):
            lengths = [len(self.blocks[block][1]) for block in blocks]
            parts = self._solve(blocks, anchor, ridge).split(lengths)
            for block, part in zip(blocks, parts, strict=True):
                fused.update(split(block, part, anchor))
        return fused

    def average(self, anchor: State) -> dict[str, Tensor]:
        """Return the mean by examples in the anchor's dtypes; tensors that no client sent are the anchor's."""
        if not self.clients:
            return dict(anchor)
        mean = {**anchor, **divide(self.mean, self.examples, anchor)}
        return mean | {name: tally.mean for name, tally in self.tallies.items()}

    def total(self) -> "Accumulator":
        """Return the sums of all clients, which are these; a robust rule has them only at the end."""
        return self

    @property
    def precisions(self) -> dict[Block, Precision]:
        """The sum of precisions of each block."""
        return {block: precision for block, (precision, _) in self.blocks.items()}

    def _add(self, precisions: Mapping[Block, Precision], cross_moment: Callable[[Block], Tensor]) -> None:
        for blocks, total in sum_precisions(self._total, precisions):
            for block in blocks:
                summand = cross_moment(block)
                # A copy at first, because the summand may be a view of the reply, which must be freed.
                moment = self.blocks[block][1].add_(summand) if block in self.blocks else summand.clone()
                self.blocks[block] = total, moment

    def _tally(self, tallies: Mapping[str, Tally]) -> None:
        for name, tally in tallies.items():
            self.tallies[name] = self.tallies[name] + tally if name in self.tallies else tally

    def _total(self, block: Block) -> Precision | None:
        return self.blocks[block][0] if block in self.blocks else None

    def _solve(self, blocks: Sequence[Block], anchor: State, ridge: Ridge | None) -> Tensor:
        """Return the weights of blocks that share one precision, stacked along the outputs."""
        precision = self.blocks[blocks[0]][0]
        moment = torch.cat([self.blocks[block][1] for block in blocks])
        if ridge is None:
            return precision.solve(moment)
        prior = precision.isotropic(ridge.strength)
        targets = (self._target(block, anchor, ridge) for block in blocks)
        target = torch.cat([target.to(moment.dtype) for target in targets])
        if not prior.weight:
            # The sum is zero, as for a layer that no example reaches; there is nothing to solve.
            return target
        return (precision + prior).solve(moment + prior.weigh(target))

    def _target(self, block: Block, anchor: State, ridge: Ridge) -> Tensor:
        if ridge.target == "anchor":
            return join(block, anchor)
        return join(block, {name: self.mean[name] / self.examples for name in tensor_names(block)})


def _cross_moment(update: Update, block: Block) -> Tensor:
    # In a refit the client sends the product with its targets; there are no weights to multiply.
    if block in update.cross_moments:
        return update.cross_moments[block]
    return update.precisions[block].weigh(join(block, update.parameters).double())


def fuse(anchor: State, updates: Iterable[Update], ridge: Ridge | None = None) -> dict[str, Tensor]:
    """Fuse updates that are all in memory; equal to adding them one by one and finalizing.

    Sums are on the CPU, and the model is on the devices of the anchor.
    """
    local = {name: tensor.cpu() for name, tensor in anchor.items()}
    accumulator = Accumulator.zero(local)
    for update in updates:
        accumulator.add(update.cpu())
    return {name: tensor.to(anchor[name].device) for name, tensor in accumulator.finalize(local, ridge).items()}
