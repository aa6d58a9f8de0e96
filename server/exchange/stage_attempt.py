"""One attempt at a stage: the request goes out, each reply is checked and added or refused by name.

One client's bad reply never ends a round: it becomes an outcome in the report.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedbasin.proto import packing
from fedbasin.proto.header import HEADER, records
from fedbasin.proto.reply import Metrics, read_metrics
from fedbasin.proto.report import AlignmentReport, ClientReport, PathSums, StageReport
from fedbasin.proto.request import Config
from fedbasin.server.exchange.client_paths import checked_path, checked_variance
from fedbasin.server.exchange.receive import Received, receive
from fedbasin.server.exchange.streaming_grid import NodeReply, Quorum
from fedbasin.server.exchange.update_directions import UpdateDirections
from fedbasin.strategies.diagnostics.probe_sampling import bound
from fedbasin.strategies.diagnostics.update_cosines import Vector
from fedbasin.strategies.round.fuse import Fuse
from fedbasin.strategies.round.outcomes import Outcome, Refusal
from fedbasin.strategies.round.stage import Stage, StageResult
from fedbasin.strategies.round.weighted_means import weighted_means
from fedbasin.strategies.tensors.state import State

MetricsFn = Callable[[list[RecordDict], str], MetricRecord]
ClientMetricsFn = Callable[[int, State], Mapping[str, float]]


@dataclass(frozen=True)
class StageLimits:
    """The limits of a stage.

    Attributes:
        timeout_seconds: deadline of one attempt.
        quorum: share of the asked clients that must be accepted.
        attempts: number of times that the stage is tried.
        max_update_bytes: larger replies are refused.
        grace_seconds: time to wait for the rest once a quorum has replied; None for the deadline.
        probe_share: share of the asked clients that evaluate a path, where the stage requests one.
        least_clients: number of clients that must be accepted of any quorum, where as many are asked.
    """

    timeout_seconds: float = 3600.0
    quorum: float = 0.5
    attempts: int = 2
    max_update_bytes: int = 2**31
    grace_seconds: float | None = None
    probe_share: float = 1.0
    least_clients: int = 1

    def needed(self, asked: int) -> int:
        """Return the number of clients that must be accepted."""
        return max(1, math.ceil(self.quorum * asked), min(self.least_clients, asked))

    def early_end(self, asked: int) -> Quorum | None:
        """Return when to stop waiting before the deadline; None for never."""
        if self.grace_seconds is None:
            return None
        return Quorum(self.needed(asked), self.grace_seconds)


@dataclass(frozen=True, eq=False)
class RoundContext:
    """Properties of a round that every request of it has in common.

    Attributes:
        number: number of the round, from 1.
        config: the app's own settings for its clients.
        packed: whether models travel as one flat array per dtype.
        weight_key: metric whose value is the weight of a client.
        arrays_key: name of the record of arrays.
        config_key: name of the record of settings.
        array_names: by the model's names, the names of arrays that are called otherwise.
        previous: the movement of the global model in the round before, at sampled entries.
    """

    number: int
    config: Config = field(default_factory=dict)
    packed: bool = False
    weight_key: str = "num-examples"
    arrays_key: str = "arrays"
    config_key: str = "config"
    array_names: Mapping[str, str] = field(default_factory=dict)
    previous: Vector | None = None


class StageAttempt:
    """The running state of one attempt at a stage.

    Attributes:
        request: what is asked, complete.
        nodes: the clients that are asked.
        messages: one message for each.
    """

    def __init__(
        self,
        make: Callable[[], Stage],
        carries: State,
        nodes: list[int],
        context: RoundContext,
        limits: StageLimits,
        *,
        arrays: ArrayRecord | None = None,
        digest: bytes | None = None,
        client_metrics_fn: ClientMetricsFn | None = None,
    ) -> None:
        """Prepare the request.

        Args:
            make: makes the stage, which counts as the server's own time.
            carries: the tensors that the messages bring.
            nodes: the clients to ask.
            context: what all requests of the round have in common.
            limits: the limits of the stage.
            arrays: those tensors as ordinary arrays, if they exist already.
            digest: their digest, if it is known.
            client_metrics_fn: makes further metrics of an accepted client's parameters.
        """
        self.nodes = nodes
        self.limits = limits
        self._anchor = carries
        self._client_metrics_fn = client_metrics_fn
        self._started = time.perf_counter()
        self._server_seconds = self._seconds = 0.0
        self._clients: list[ClientReport] = []
        self._accepted: set[int] = set()
        self._contents: list[RecordDict] = []
        self._metrics: list[tuple[Metrics, float]] = []
        self._path = PathSums()
        self._variance: list[tuple[Mapping[str, float], float]] = []
        with self._working():
            self.stage = make()
            self._directions: UpdateDirections | None = None
            if self.stage.request.stage == Fuse.stage:
                self._directions = UpdateDirections(carries, context.previous)
            self.request = replace(
                self.stage.request,
                round=context.number,
                anchor=carries,
                anchor_digest=digest or packing.digest(carries),
                config=context.config,
                weight_key=context.weight_key,
                arrays_key=context.arrays_key,
                config_key=context.config_key,
                array_names=context.array_names,
                probe_bound=self._probe_bound(context.number),
            )
            content = self.request.to_content(packed=context.packed, arrays=arrays)
            self._bytes_down = _array_bytes(content)
            self.messages = self.request.to_messages(content, nodes)

    @property
    def accepted(self) -> int:
        """Number of clients in the sum."""
        return len(self._accepted)

    @property
    def needed(self) -> int:
        """Number of clients that must be in the sum."""
        return self.limits.needed(len(self.nodes))

    def add_all(self, replies: Iterable[NodeReply]) -> None:
        """Add or refuse every reply, one by one as they arrive."""
        for reply in replies:
            with self._working():
                self._clients.append(self._report(reply))
            # Not to be held while the next one is awaited.
            del reply

    def report(self) -> StageReport:
        """Return the outcomes so far."""
        return StageReport(
            self.request.stage,
            self._seconds,
            self._server_seconds,
            tuple(self._clients),
            dict(self.stage.request.encodings),
        )

    def finish(self, metrics_fn: MetricsFn | None = None) -> StageResult:
        """Return the stage's result, once enough clients are in it.

        Args:
            metrics_fn: aggregates the clients' metrics; None for their weighted means.
        """
        with self._working():
            model = self.stage.finish()
        return StageResult(
            model,
            self.report(),
            self._aggregate(metrics_fn),
            self._path if self._path.points else None,
            {name: value for name, value in weighted_means(self._variance).items() if isinstance(value, float)},
            self.stage.layer_graph,
            self._directions.finish if self._directions else None,
        )

    def _aggregate(self, metrics_fn: MetricsFn | None) -> dict[str, float | list[float]]:
        if not self._contents:
            return {}
        key = self.request.weight_key
        if metrics_fn is not None:
            return read_metrics(metrics_fn(self._contents, key))
        return weighted_means(self._metrics)

    def _probe_bound(self, number: int) -> int | None:
        share = self.limits.probe_share
        if share == 1 or not self.stage.request.path_points:
            return None
        return bound(self.nodes, number, share)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Count the server's own time."""
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        self._server_seconds += ended - began
        self._seconds = ended - self._started

    def _report(self, reply: NodeReply) -> ClientReport:
        try:
            return self._accept(reply)
        except Refusal as refusal:
            return ClientReport(
                reply.node_id,
                refusal.outcome.name,
                refusal.detail,
                bytes_up=_payload_bytes(reply.message),
                bytes_down=self._bytes_down,
                seconds=reply.seconds,
            )

    def _accept(self, node_reply: NodeReply) -> ClientReport:
        node = node_reply.node_id
        if node_reply.message is None:
            outcome = Outcome.left_out if node_reply.left_out else Outcome.timeout
            raise Refusal(outcome, node_reply.problem)
        if node in self._accepted:
            raise Refusal(Outcome.duplicate, f"node {node}")
        received = receive(node_reply.message, self.request, self.limits.max_update_bytes)
        path = checked_path(received.reply, self.request, node)
        variance = checked_variance(received.reply, self._anchor) if path else {}
        aligned = self.stage.accept(node, received.update)
        self._accepted.add(node)
        self._path += path or PathSums()
        self._variance.append((variance, 1.0))
        self._metrics.append((received.reply.metrics, received.reply.examples))
        self._contents.append(_metrics_content(node_reply.message.content, received, self.request.weight_key))
        report = self._describe(node_reply, received, aligned)
        # Where the server aligns, the parameters of the reply are not those that went into the sum.
        if self._directions is None or aligned is not None:
            return report
        norm, cosine = self._directions.add(received.update.parameters)
        return replace(report, update_norm=norm, update_cosine=cosine)

    def _describe(self, node_reply: NodeReply, received: Received, aligned: AlignmentReport | None) -> ClientReport:
        reply, parameters = received.reply, received.update.parameters
        alignment = reply.alignment if aligned is None and self.request.aligns else aligned
        metrics = reply.scalars
        if self._client_metrics_fn is not None:
            metrics |= self._client_metrics_fn(node_reply.node_id, parameters)
        return ClientReport(
            node_reply.node_id,
            Outcome.accepted.name,
            "" if reply.has_mod or not self.request.aligns else "not aligned: the app lacks the mod",
            received.update.examples,
            reply.payload_bytes,
            self._bytes_down,
            node_reply.seconds,
            reply.train_seconds,
            alignment,
            metrics,
            reply.probe_seconds,
            reply.probe_bytes,
        )


def _array_bytes(content: RecordDict) -> int:
    return sum(packing.nbytes(record) for record in records(content, ArrayRecord).values())


def _payload_bytes(message: Message | None) -> int:
    return 0 if message is None or message.has_error() else _array_bytes(message.content)


def _metrics_content(content: RecordDict, received: Received, key: str) -> RecordDict:
    """Return a reply's records without arrays, which a function that aggregates metrics reads."""
    app_records = {
        name: record
        for name, record in content.items()
        if not isinstance(record, ArrayRecord | MetricRecord) and name != HEADER
    }
    metrics = MetricRecord({**received.reply.metrics, key: received.reply.examples})
    return RecordDict({"metrics": metrics, **app_records})
