"""The loop of a stage, written once for all: ask, wait, decode, fold or refuse, report.

One client's bad reply never ends a round: it becomes an outcome in the report. A stage that too few clients
answered well is asked anew, and after the last attempt the round ends with an error that names them all.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord
from torch import Tensor

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.server.grid import Quorum, Reply, StreamingGrid
from fedbasin.strategies.alignment.matching import AlignmentReport
from fedbasin.strategies.messages import (
    Broadcast,
    Received,
    alignment_message,
    broadcast,
    receive,
    requests,
)
from fedbasin.strategies.metrics import WeightedMeans
from fedbasin.strategies.outcome import Outcome, Refusal
from fedbasin.strategies.stages import Stage
from fedbasin.strategies.state import State

Observe = Callable[[int, State], Mapping[str, float]]


class QuorumLostError(RuntimeError):
    """Too few clients' replies were accepted, in every attempt."""


@dataclass(frozen=True)
class Budget:
    """What a stage may take.

    Attributes:
        timeout_seconds: deadline of one attempt.
        quorum: share of the asked that must be accepted.
        attempts: how often the stage is asked.
        max_update_bytes: larger replies are refused.
        grace_seconds: how long to wait for the rest once a quorum has answered; None for the deadline.
    """

    timeout_seconds: float = 3600.0
    quorum: float = 0.5
    attempts: int = 2
    max_update_bytes: int = 2**31
    grace_seconds: float | None = None

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
    """

    model: dict[str, Tensor]
    report: pb.StageReport
    metrics: dict[str, float]
    path: pb.PathSums


@dataclass(frozen=True, eq=False)
class Question:
    """One stage of one round, ready to be asked of some nodes.

    Attributes:
        make: the stage, fresh for every attempt.
        anchor: the model that is sent.
        server_round: from 1.
        config: the app's own settings for its clients.
        observe: called with each accepted client's node id and parameters; its metrics are reported.
    """

    make: Callable[[], Stage]
    anchor: State
    server_round: int
    config: ConfigRecord
    observe: Observe | None = None


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
        result = attempt.run(grid, nodes)
        if attempt.accepted >= needed:
            return result
    raise QuorumLostError(_lost(result.report, needed, budget.attempts))


def _lost(report: pb.StageReport, needed: int, attempts: int) -> str:
    refused = [c for c in report.clients if c.outcome != Outcome.accepted.name]
    reasons = "; ".join(f"node {c.node_id}: {c.outcome}, {c.detail}" for c in refused)
    return (
        f"stage {report.stage}: {len(report.clients) - len(refused)} of {len(report.clients)} clients "
        f"accepted, {needed} needed, in each of {attempts} attempts ({reasons}); mend the clients, or lower "
        "fedbasin.quorum, and resume"
    )


@dataclass(eq=False)
class _Attempt:
    """The running state of one attempt at a stage."""

    question: Question
    budget: Budget
    accepted: int = 0
    server_seconds: float = 0.0
    seen: set[int] = field(default_factory=set)
    metrics: WeightedMeans = field(default_factory=WeightedMeans)
    path: pb.PathSums = field(default_factory=pb.PathSums)

    def run(self, grid: StreamingGrid, nodes: Sequence[int]) -> StageResult:
        """Ask every node once and fold what comes back."""
        started = time.perf_counter()
        stage = self.question.make()
        sent = broadcast(
            stage, self.question.anchor, self.question.server_round, self.question.config
        )
        self.server_seconds += time.perf_counter() - started
        report = pb.StageReport(stage=stage.name)
        early_end = self.budget.early_end(len(nodes))
        for reply in grid.stream(requests(sent, nodes), self.budget.timeout_seconds, early_end):
            report.clients.append(self._client(stage, sent, reply))
            # Not to be held while the next one is awaited.
            del reply
        finishing = time.perf_counter()
        model = stage.finish()
        ended = time.perf_counter()
        report.seconds = ended - started
        report.server_seconds = self.server_seconds + ended - finishing
        return StageResult(model, report, self.metrics.means(), self.path)

    def _client(self, stage: Stage, sent: Broadcast, reply: Reply) -> pb.ClientReport:
        report = pb.ClientReport(
            node_id=reply.node_id, seconds=reply.seconds, bytes_down=sent.payload_bytes
        )
        started = time.perf_counter()
        try:
            self._fold(stage, sent, reply, report)
            report.outcome = Outcome.accepted.name
            self.accepted += 1
        except Refusal as refusal:
            report.outcome, report.detail = refusal.outcome.name, refusal.detail
        self.server_seconds += time.perf_counter() - started
        return report

    def _fold(self, stage: Stage, sent: Broadcast, reply: Reply, report: pb.ClientReport) -> None:
        if reply.message is None:
            raise Refusal(Outcome.timeout, reply.problem)
        if reply.node_id in self.seen:
            raise Refusal(Outcome.duplicate, f"node {reply.node_id}")
        received = receive(reply.message, sent, self.budget.max_update_bytes)
        report.bytes_up = received.payload_bytes
        path = _checked_path(received.header.path, sent.header)
        aligned = stage.accept(reply.node_id, received.update)
        self.seen.add(reply.node_id)
        _describe(report, received, aligned)
        if self.question.observe is not None:
            report.metrics.update(self.question.observe(reply.node_id, received.update.parameters))
        self.metrics.add(received.metrics, received.update.examples)
        add_path(self.path, path)


def _describe(report: pb.ClientReport, received: Received, aligned: AlignmentReport | None) -> None:
    report.examples = received.update.examples
    report.train_seconds = received.header.train_seconds
    report.metrics.update(received.metrics)
    if received.header.HasField("alignment"):
        report.alignment.CopyFrom(received.header.alignment)
    if aligned is not None:
        report.alignment.CopyFrom(alignment_message(aligned))


def _checked_path(path: pb.PathSums, asked: pb.Request) -> pb.PathSums:
    """The client's path sums, if they are what was asked for: a bad number would spoil everybody's."""
    curves = (
        path.points,
        path.loss_before,
        path.loss_after,
        path.correct_before,
        path.correct_after,
    )
    if any(len(curve) != asked.path_points for curve in curves):
        raise Refusal(
            Outcome.missing_statistic,
            f"the path has {len(path.points)} of {asked.path_points} points",
        )
    if not all(math.isfinite(value) for curve in (*curves, [path.examples]) for value in curve):
        raise Refusal(Outcome.non_finite, "the path's losses")
    return path


def add_path(total: pb.PathSums, path: pb.PathSums) -> None:
    """Add one client's path sums to the total, in place."""
    if not total.points:
        total.CopyFrom(path)
        return
    for name in ("loss_before", "loss_after", "correct_before", "correct_after"):
        sums = getattr(total, name)
        for index, value in enumerate(getattr(path, name)):
            sums[index] += value
    total.examples += path.examples
