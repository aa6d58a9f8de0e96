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
from fedbasin.server.grid import Quorum, Reply, StreamingGrid
from fedbasin.strategies.alignment.matching import AlignmentReport
from fedbasin.strategies.diagnostics.barrier import Path
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
        digest: of the anchor, where it is known.
    """

    make: Callable[[], Stage]
    anchor: State
    server_round: int
    config: ConfigRecord
    observe: Observe | None = None
    digest: bytes | None = None


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

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.report = pb.StageReport()
        with self._working():
            self.stage = self.question.make()
        self.report.stage = self.stage.name
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
        return StageResult(model, self.report, self.metrics.means(), self.path)

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
        path = _checked_path(received.header.path, sent)
        aligned = self.stage.accept(reply.node_id, received.update)
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


def _checked_path(sums: pb.PathSums, sent: Broadcast) -> pb.PathSums:
    """One client's path sums, if they are what was asked for: a bad number would spoil everybody's."""
    count = sent.header.path_points
    # A client that has lost its model since training still evaluates the new one.
    if not count or (sent.kind == "evaluate" and not sums.points):
        return pb.PathSums()
    points = [index / (count - 1) for index in range(count)]
    if list(sums.points) != points:
        raise Refusal(
            Outcome.missing_statistic, f"the path has points {sums.points}, not {count} from 0 to 1"
        )
    checked = pb.PathSums(points=points, examples=sums.examples, clients=1)
    for when in ("after",) if sent.kind == "evaluate" else ("before", "after"):
        for name, curve in _checked_curves(sums, when).items():
            getattr(checked, name).extend(curve)
    return checked


def _checked_curves(sums: pb.PathSums, when: str) -> dict[str, tuple[float, ...]]:
    names = f"loss_{when}", f"correct_{when}"
    loss, correct = (tuple(getattr(sums, name)) for name in names)
    try:
        Path(tuple(sums.points), loss, correct, sums.examples)
    except ValueError as error:
        finite = all(map(math.isfinite, (*loss, *correct, sums.examples)))
        outcome = Outcome.malformed if finite else Outcome.non_finite
        raise Refusal(outcome, f"the path {when} alignment: {error}") from error
    return dict(zip(names, (loss, correct), strict=True))


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
    total.clients += path.clients
