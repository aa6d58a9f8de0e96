"""A stage of a round: one request to some clients, and the sum of what they reply.

    bootstrap   send your own initial model, so that one client's becomes the anchor
    fuse        train, align to the anchor, send what you know; the sum becomes the model
    refit       send how layers of the model so far fit to your data
    evaluate    evaluate the new model

A stage knows its request and how to add a reply. How the request travels, which clients are asked, the deadline and
the handling of refusals are written once for all stages, in `fedbasin.server.run`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from torch import Tensor

from fedbasin.proto.layer_graph import LayerGraph
from fedbasin.proto.report import AlignmentReport, PathSums, StageReport, UpdateCosines
from fedbasin.proto.request import Request
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.distillation.distilled_accumulator import DistilledAccumulator
from fedbasin.strategies.fusion.rules.robust.robust_accumulator import RobustAccumulator
from fedbasin.strategies.fusion.rules.rule_accumulator import RuleAccumulator
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.direction_agreement import DirectionAgreement
from fedbasin.strategies.tensors.state import State

# Makes an accumulator without clients: a sum, or the updates themselves for a robust or merging rule.
Accumulate: TypeAlias = Callable[[State], Accumulator | RobustAccumulator | RuleAccumulator | DistilledAccumulator]


@dataclass(frozen=True, eq=False)
class Checked:
    """An update that has passed the checks.

    Attributes:
        update: what may be added.
        distances: Euclidean distance of each floating tensor from the one that the client was sent.
        alignment: the report of the server's own alignment; None where the stage does not align.
    """

    update: Update
    distances: Mapping[str, float] = field(default_factory=dict)
    alignment: AlignmentReport | None = None


class Stage(Protocol):
    """One request to some clients.

    Every update is checked before any is added, because what is ordinary shows only once all clients have replied. A
    refusal leaves no trace.

    Attributes:
        request: what is asked of every client.
    """

    request: Request

    @property
    def layer_graph(self) -> LayerGraph | None:
        """The model's layers as the first client reports them; None where that was not requested."""
        ...

    @property
    def average(self) -> dict[str, Tensor] | None:
        """The mean by examples, where clients compare it with the stage's model; None elsewhere."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the fusion has made of each update, in the order in which they were added, once the stage has ended.

        Empty where all of every update is in the sum.
        """
        ...

    def check(self, update: Update) -> Checked:
        """Check one client's update.

        Raises:
            Refusal: the update must not become part of the sum.
        """
        ...

    def add(self, node: int, update: Update) -> None:
        """Add one client's update that has passed the checks; it is not kept.

        Raises:
            Refusal: the update does not fit to those that were added before.
        """
        ...

    def finish(self) -> dict[str, Tensor]:
        """Return the model that the stage ends in."""
        ...


@dataclass(frozen=True, eq=False)
class StagePlan:
    """A stage that a round asks for next.

    Attributes:
        make: makes the stage, fresh for every attempt.
        carries: the tensors that its messages bring.
        nodes: the clients to ask; None for those that the round has sampled.
        may_fail: whether the round goes on where too few reply; it then receives a result without nodes.
        trains: whether this is the stage in which clients train and are fused, which the Flower strategy runs.
    """

    make: Callable[[], Stage]
    carries: State
    nodes: Sequence[int] | None = None
    may_fail: bool = False
    trains: bool = False


@dataclass(frozen=True, eq=False)
class StageResult:
    """The end of a stage.

    Attributes:
        model: the model that the stage ends in.
        report: the outcome of every client's reply.
        metrics: aggregated metrics of the clients.
        path: sums along the evaluated path, over the accepted clients.
        paths: those of each accepted client that has evaluated it.
        variance: variance ratios by layer, means over the clients that measured them.
        layer_graph: the model's layers, where the stage requested them.
        failed: whether too few clients replied, so that `model` is the one that the stage began with.
        average: the mean by examples, where clients compare it with `model`; None elsewhere.
        cosines: makes the cosines of the clients' updates once the round's model is known; None where they were not
            measured.
        agreement: what the directions of the clients' updates say of them, for the later stages of the round as well.
    """

    model: dict[str, Tensor]
    report: StageReport
    metrics: Mapping[str, float | list[float]] = field(default_factory=dict)
    path: PathSums | None = None
    paths: tuple[PathSums, ...] = ()
    variance: Mapping[str, float] = field(default_factory=dict)
    layer_graph: LayerGraph | None = None
    failed: bool = False
    average: dict[str, Tensor] | None = None
    cosines: Callable[[State], tuple[UpdateCosines, Tensor] | None] | None = None
    agreement: DirectionAgreement = field(default_factory=DirectionAgreement)

    @property
    def curve(self) -> Path | None:
        """The loss along the path, for clients' models as they were sent; None where nothing was evaluated."""
        path = self.path
        if path is None or not path.points:
            return None
        return Path(path.points, path.loss_after, path.correct_after, path.examples)

    @property
    def nodes(self) -> list[int]:
        """The accepted clients."""
        return [client.node_id for client in self.report.accepted]

    @property
    def judges(self) -> list[int]:
        """The accepted clients that keep examples which nobody trains on."""
        return [client.node_id for client in self.report.accepted if client.judges]

    @property
    def examples(self) -> float:
        """The sum of the accepted clients' weights."""
        return sum(client.examples for client in self.report.accepted)
