"""What a round is made of: the stages that it chooses from, and the models that it ends in."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import TypeAlias, TypeVar

from torch import Tensor

from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import BatchNorm, Block
from fedbasin.proto.report import Choice, Step
from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.head_memory import HeadMemory
from fedbasin.strategies.recipes import LayerRefit
from fedbasin.strategies.round.choice import SLOW
from fedbasin.strategies.round.fit_plan import Grouping
from fedbasin.strategies.round.stage import Accumulate, Stage, StagePlan, StageResult
from fedbasin.strategies.tensors.state import State


@dataclass(frozen=True, eq=False)
class RoundResult:
    """The end of a round.

    Attributes:
        model: the model that the next round trains on, before the server optimizer.
        served: the model that is evaluated and handed to the user; None where it is the same.
        average: the mean of the clients' models, from which training can go on as ever; None where it is `model`.
        choice: how the models were chosen; None where clients did not compare any.
        left_out: what of the recipe the model has no layers for; empty where all of it was done.
        step: the step beyond the mean; None where none was looked for.
    """

    model: dict[str, Tensor]
    served: dict[str, Tensor] | None = None
    average: dict[str, Tensor] | None = None
    choice: Choice | None = None
    left_out: str = ""
    step: Step | None = None


Outcome = TypeVar("Outcome")
Round: TypeAlias = Generator[StagePlan, StageResult, RoundResult]
# Chooses how clients send what they know about the layers that a round fits.
Encode: TypeAlias = Callable[[Sequence[Block]], Mapping[Block, Encoding]]
# Merges the models of some clients in pairs.
MergeInPairs: TypeAlias = Callable[[list[int], State], Generator[StagePlan, StageResult, dict[str, Tensor] | None]]


@dataclass(frozen=True, eq=False)
class RoundStages:
    """The stages that a round chooses from.

    Attributes:
        fuse: makes the first stage; it requests the layer graph if the recipe fits layers, and that clients keep
            their models.
        bootstrap: makes the search for an anchor; None where the global model is one.
        bootstrap_one_by_one: whether the clients are asked one after the other, until one replies.
        merge: merges models in pairs after training; None where the sum is the merge.
        norms: the BatchNorm layers whose running statistics are measured anew on the fused model.
        grouping: whether layers are fitted one after the other, or a block of them at a time.
        encode: chooses how clients send their sums; None for exactly.
        accumulate: makes the accumulator of a stage that fits layers.
        own_refit: a fit of all layers that is tried first, because clients share no start; None for the recipe's own.
        memory: the head's sums of earlier rounds; None for none.
        number: number of the round.
        shortfall: loss of the mean above that of the served model when they were last compared; infinite where they
            were not.
        slow: the part of the shortfall above which averaging is slow.
        before: the global model that the round before began with; empty where this round is not to go on from there.
    """

    fuse: Callable[[State], Stage]
    bootstrap: Callable[[State], Stage] | None = None
    bootstrap_one_by_one: bool = False
    merge: MergeInPairs | None = None
    norms: tuple[BatchNorm, ...] = ()
    grouping: Grouping = "layer"
    encode: Encode | None = None
    accumulate: Accumulate = Accumulator.zero
    own_refit: LayerRefit | None = None
    memory: HeadMemory | None = None
    number: int = 0
    shortfall: float = inf
    slow: float = SLOW
    before: State = field(default_factory=dict)


def or_else(
    further: Generator[StagePlan, StageResult, Outcome], otherwise: Outcome
) -> Generator[StagePlan, StageResult, Outcome]:
    """Run further stages of a round and return their outcome; where one of them fails, the other one."""
    try:
        plan = next(further)
        while True:
            result = yield replace(plan, may_fail=True)
            if result.failed and not plan.may_fail:
                return otherwise
            plan = further.send(result)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
