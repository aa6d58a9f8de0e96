"""The loop of a stage, written once for all: ask, wait, decode, fold or refuse, report.

One client's bad reply never ends a round: it becomes an outcome in the report. A stage that too few clients
answered well is asked anew, and after the last attempt the round ends with an error that names them all.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.app import ConfigRecord
from torch import Tensor

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.layer_graph import LayerGraph
from fedbasin.server.run.client_paths import add_path, checked_path, checked_variance
from fedbasin.server.run.directions import Directions
from fedbasin.server.run.streaming_grid import Quorum, Reply, StreamingGrid
from fedbasin.strategies.alignment.weight_matching import AlignmentReport
from fedbasin.strategies.diagnostics.barrier import Path
from fedbasin.strategies.diagnostics.probe_sampling import bound
from fedbasin.strategies.diagnostics.update_cosines import Vector
from fedbasin.strategies.encodings import encoding_messages
from fedbasin.strategies.messages import (
    Broadcast,
    Received,
    alignment_message,
    broadcast,
    receive,
    requests,
)
from fedbasin.strategies.round.outcomes import Outcome, Refusal
from fedbasin.strategies.round.stages import Fuse, Stage
from fedbasin.strategies.round.weighted_means import WeightedMeans
from fedbasin.strategies.tensors.state import State

Observe = Callable[[int, State], Mapping[str, float]]


class QuorumLostError(RuntimeError):
    """Too few clients' replies were accepted, in every attempt.

    Attributes:
        report: of the last attempt.
    """

    def __init__(self, report: pb.StageReport, needed: int, attempts: int) -> None:
        refused = [c for c in report.clients if c.outcome != Outcome.accepted.name]
        reasons = "; ".join(f"node {c.node_id}: {c.outcome}, {c.detail}" for c in refused)
        super().__init__(
            f"stage {report.stage}: {len(report.clients) - len(refused)} of {len(report.clients)} "
            f"clients accepted, {needed} needed, in each of {attempts} attempts ({reasons}); mend the "
            "clients, or lower fedbasin.quorum, and resume"
        )
        self.report = report


@dataclass(frozen=True)
class Budget:
    """What a stage may take.

    Attributes:
        timeout_seconds: deadline of one attempt.
        quorum: share of the asked that must be accepted.
        attempts: how often the stage is asked.
        max_update_bytes: larger replies are refused.
        grace_seconds: how long to wait for the rest once a quorum has answered; None for the deadline.
        probe_share: share of the asked that evaluate a path, where the stage asks for one.
    """

    timeout_seconds: float = 3600.0
    quorum: float = 0.5
    attempts: int = 2
    max_update_bytes: int = 2**31
    grace_seconds: float | None = None
    probe_share: float = 1.0

    def needed(self, asked: int) -> int:
        """How many of the asked must be accepted."""
        return max(1, math.ceil(self.quorum * asked))

    def early_end(self, asked: int) -> Quorum | None:
        """When to stop waiting before the deadline."""
        if self.grace_seconds is None:
            return None
        return Quorum(self.needed(asked), self.grace_seconds)


@dataclass(frozen=True, eq=False)
class StageResult:
    """What a stage ended in.

    Attributes:
        model: its value.
        report: who answered, and how it went.
        metrics: the clients' metrics, means weighted by examples.
        path: sums over the accepted clients.
        variance: of the layers, means over the clients that measured it.
        directions: of the clients' updates, to be finished with the round's model; None in stages that fuse nothing.
        layer_graph: of the model's layers, where the stage asked for it.
    """

    model: dict[str, Tensor]
    report: pb.StageReport
    metrics: dict[str, float]
    path: pb.PathSums
    variance: Mapping[str, float] = field(default_factory=dict)
    directions: Directions | None = None
    layer_graph: LayerGraph | None = None

    @property
    def curve(self) -> Path | None:
        """The sums along the path, of models as they were sent."""
        if not self.path.points:
            return None
        path = self.path
        return Path(
            tuple(path.points), tuple(path.loss_after), tuple(path.correct_after), path.examples
        )

    @property
    def nodes(self) -> list[int]:
        """The accepted clients."""
        accepted = Outcome.accepted.name
        return [client.node_id for client in self.report.clients if client.outcome == accepted]

    @property
    def examples(self) -> float:
        """Of the accepted clients."""
        accepted = Outcome.accepted.name
        return sum(c.examples for c in self.report.clients if c.outcome == accepted)


@dataclass(frozen=True, eq=False)
class Question:
    """One stage of one round, ready to be asked of some nodes.

    Attributes:
        make: the stage, fresh for every attempt.
        anchor: the model that is sent.
        server_round: from 1.
        config: the app's own settings for its clients.
        observe: called with each accepted client's node id and parameters; its metrics are reported.
        digest: of the anchor, where it is known.
        previous: what the round before moved the global model by, where that is known.
    """

    make: Callable[[], Stage]
    anchor: State
    server_round: int
    config: ConfigRecord
    observe: Observe | None = None
    digest: bytes | None = None
    previous: Vector | None = None


def run_stage(
    grid: StreamingGrid, question: Question, nodes: Sequence[int], budget: Budget
) -> StageResult:
    """Ask until enough clients are in the sum.

    Raises:
        QuorumLostError: no attempt reached the quorum; names every refused client and its outcome.
    """
    needed = budget.needed(len(nodes))
    for _ in range(budget.attempts):
        attempt = _Attempt(question, budget)
        report = attempt.ask(grid, nodes)
        if attempt.accepted >= needed:
            return attempt.finish()
    raise QuorumLostError(report, needed, budget.attempts)


@dataclass(eq=False)
class _Attempt:
    """The running state of one attempt at a stage."""

    question: Question
    budget: Budget
    metrics: WeightedMeans = field(default_factory=WeightedMeans)
    path: pb.PathSums = field(default_factory=pb.PathSums)
    variance: WeightedMeans = field(default_factory=WeightedMeans)
    directions: Directions | None = None

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.report = pb.StageReport()
        with self._working():
            self.stage = self.question.make()
            if self.stage.name == Fuse.name:
                self.directions = Directions(self.question.anchor, self.question.previous)
        self.report.stage = self.stage.name
        self.report.encodings.extend(encoding_messages(self.stage.ask.encodings))
        self.seen: set[int] = set()

    @property
    def accepted(self) -> int:
        """How many clients are in the sum."""
        return len(self.seen)

    def ask(self, grid: StreamingGrid, nodes: Sequence[int]) -> pb.StageReport:
        """Ask every node once and fold what comes back."""
        question, timeout = self.question, self.budget.timeout_seconds
        with self._working():
            sent = broadcast(
                self.stage,
                question.anchor,
                question.server_round,
                question.config,
                digest=question.digest,
                probe_bound=self._probe_bound(nodes),
            )
        for reply in grid.stream(requests(sent, nodes), timeout, self.budget.early_end(len(nodes))):
            with self._working():
                self.report.clients.append(self._client(sent, reply))
            # Not to be held while the next one is awaited.
            del reply
        return self.report

    def finish(self) -> StageResult:
        """The stage's value, once enough clients are in it."""
        with self._working():
            model = self.stage.finish()
        return StageResult(
            model,
            self.report,
            self.metrics.means(),
            self.path,
            self.variance.means(),
            self.directions,
            self.stage.layer_graph,
        )

    def _probe_bound(self, nodes: Sequence[int]) -> int | None:
        share = self.budget.probe_share
        if share == 1 or not self.stage.ask.path_points:
            return None
        return bound(nodes, self.question.server_round, share)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Count the server's own time."""
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        self.report.server_seconds += ended - began
        self.report.seconds = ended - self.started

    def _client(self, sent: Broadcast, reply: Reply) -> pb.ClientReport:
        report = pb.ClientReport(
            node_id=reply.node_id, seconds=reply.seconds, bytes_down=sent.payload_bytes
        )
        try:
            self._fold(sent, reply, report)
            report.outcome = Outcome.accepted.name
        except Refusal as refusal:
            report.outcome, report.detail = refusal.outcome.name, refusal.detail
        return report

    def _fold(self, sent: Broadcast, reply: Reply, report: pb.ClientReport) -> None:
        if reply.message is None:
            raise Refusal(Outcome.timeout, reply.problem)
        if reply.node_id in self.seen:
            raise Refusal(Outcome.duplicate, f"node {reply.node_id}")
        received = receive(reply.message, sent, self.budget.max_update_bytes)
        report.bytes_up = received.payload_bytes
        path = checked_path(received.header.path, sent, reply.node_id)
        variance = checked_variance(received.header, self.question.anchor) if path.points else {}
        aligned = self.stage.accept(reply.node_id, received.update)
        self.seen.add(reply.node_id)
        _describe(report, received, aligned)
        if self.question.observe is not None:
            report.metrics.update(self.question.observe(reply.node_id, received.update.parameters))
        self.metrics.add(received.metrics, received.update.examples)
        add_path(self.path, path)
        self.variance.add(variance, 1.0)
        # Where the server aligns, these are not the weights that went into the sum.
        if self.directions is not None and aligned is None:
            self.directions.add(received.update.parameters, report)


def _describe(report: pb.ClientReport, received: Received, aligned: AlignmentReport | None) -> None:
    report.examples = received.update.examples
    report.train_seconds = received.header.train_seconds
    report.probe_seconds = received.header.probe_seconds
    report.probe_bytes = _probe_bytes(received.header)
    report.metrics.update(received.metrics)
    if received.header.HasField("alignment"):
        report.alignment.CopyFrom(received.header.alignment)
    if aligned is not None:
        report.alignment.CopyFrom(alignment_message(aligned))


def _probe_bytes(header: pb.UpdateHeader) -> int:
    """What the answers to the probes take of the header."""
    probed = (header.path, header.alignment.spectral, *header.variance)
    return sum(part.ByteSize() for part in probed)
