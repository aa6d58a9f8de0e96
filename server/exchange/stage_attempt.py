"""A stage with its clients: the request goes out, each reply is checked and added or refused by name.

One client's bad reply never ends a round: it becomes an outcome in the report. Where too few are accepted, others are
asked, and the accepted ones stay in the sum.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedbasin.proto import packing
from fedbasin.proto.header import HEADER, records
from fedbasin.proto.reply import Metrics, Reply, read_metrics
from fedbasin.proto.report import AlignmentReport, ClientReport, PathSums, StageReport
from fedbasin.proto.request import Config, Start
from fedbasin.server.exchange.client_paths import checked_path, checked_variance
from fedbasin.server.exchange.cohort import Cohort
from fedbasin.server.exchange.late_replies import Unanswered, is_usable, staleness_weight
from fedbasin.server.exchange.message_limits import shortened
from fedbasin.server.exchange.quorum import StageFailedError
from fedbasin.server.exchange.receive import Received, receive
from fedbasin.server.exchange.streaming_grid import NodeReply, Quorum
from fedbasin.server.exchange.update_directions import UpdateDirections
from fedbasin.strategies.diagnostics.probe_sampling import bound
from fedbasin.strategies.diagnostics.update_cosines import Vector
from fedbasin.strategies.fusion.spool import SpoolFiles
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.judging.direction_agreement import DirectionAgreement, direction_agreement
from fedbasin.strategies.judging.finite_model import changed, check_finite
from fedbasin.strategies.judging.influence import Measure, Verdict, judge, measure
from fedbasin.strategies.judging.label_agreement import contradicting_labels
from fedbasin.strategies.judging.loss_claims import bounded_claims
from fedbasin.strategies.judging.outcomes import Outcome, Refusal
from fedbasin.strategies.round.fuse import Fuse
from fedbasin.strategies.round.refit import CHOICES, LocalSteps, RefitHead
from fedbasin.strategies.round.stage import Stage, StageResult
from fedbasin.strategies.round.weighted_means import weighted_means
from fedbasin.strategies.tensors.state import State

_LOG = logging.getLogger("flwr.fedbasin")

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
        late_rounds: largest age of a late reply that is used, in rounds; 0 uses none.
        bounds: whether one client's influence is bounded by what the clients have in common.
        claims: whether that holds for the losses by which clients choose between models.
    """

    timeout_seconds: float = 3600.0
    quorum: float = 0.5
    attempts: int = 2
    max_update_bytes: int = 2**31
    grace_seconds: float | None = None
    probe_share: float = 1.0
    least_clients: int = 1
    late_rounds: int = 0
    bounds: bool = True
    claims: bool = True

    def needed(self, asked: int) -> int:
        """Return the number of clients that must be accepted."""
        return max(1, math.ceil(self.quorum * asked), min(self.least_clients, asked))

    def is_by_rule(self, asked: int) -> bool:
        """Return whether it is not the quorum that needs as many."""
        return self.needed(asked) > max(1, math.ceil(self.quorum * asked))

    def early_end(self, asked: int, accepted: int = 0) -> Quorum | None:
        """Return when to stop waiting before the deadline; None for never.

        Args:
            asked: the number of clients that were asked.
            accepted: how many of them are in the sum already.
        """
        if self.grace_seconds is None:
            return None
        return Quorum(self.needed(asked) - accepted, self.grace_seconds)


# Remarks on accepted replies.
LACKS_MOD = "the app lacks the mod"
CANNOT_REPORT = "cannot report its layers"


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
        files: where replies are kept until all have come.
        compares: whether clients compare the round's models by their losses.
    """

    number: int
    config: Config = field(default_factory=dict)
    packed: bool = False
    weight_key: str = "num-examples"
    arrays_key: str = "arrays"
    config_key: str = "config"
    array_names: Mapping[str, str] = field(default_factory=dict)
    previous: Vector | None = None
    files: SpoolFiles = field(default_factory=SpoolFiles)
    compares: bool = False


class StageAttempt:
    """The running state of a stage.

    Attributes:
        request: what is asked, complete.
        nodes: the clients of which a quorum is needed.
        messages: one message for each that is to be asked now.
        awaited: the nodes that still work on an earlier round and are not asked anew, by the id of that message.
        late: other nodes that may still answer an earlier message, by its id.
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
        unanswered: Mapping[str, Unanswered] | None = None,
        agreement: DirectionAgreement | None = None,
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
            unanswered: messages of earlier rounds whose replies may still come, by their ids.
            agreement: what an earlier stage of the round has found of the directions of the clients' updates.
        """
        self.nodes = list(nodes)
        self.limits = limits
        self._asked = set(nodes)
        self._unanswered = unanswered or {}
        self._agreement = agreement or DirectionAgreement()
        self._compared = context.compares
        self._anchor = carries
        self._client_metrics_fn = client_metrics_fn
        self._started = time.perf_counter()
        self._server_seconds = self._seconds = 0.0
        self._make = make
        self._previous = context.previous
        self._clients: dict[object, ClientReport] = {}
        self._cohort = Cohort(context.files)
        self._candidates: dict[int, _Candidate] = {}
        with self._working():
            self._begin_sum()
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
            self._content = self.request.to_content(packed=context.packed, arrays=arrays)
            self._bytes_down = _array_bytes(self._content)
            self.awaited = self._busy()
            self.late = {key: m.node_id for key, m in self._unanswered.items() if key not in self.awaited}
            self.messages = self._messages_to([node for node in nodes if node not in self.awaited.values()])

    @property
    def accepted(self) -> int:
        """Number of clients in the sum."""
        return len(self._sums.nodes)

    @property
    def needed(self) -> int:
        """Number of clients that must be in the sum."""
        return self.limits.needed(len(self.nodes))

    def ask_again(self, online: Sequence[int], late: Mapping[str, int], *, others: bool = True) -> None:
        """Ask whoever is online in place of those that are not in the sum.

        A node that is gone no longer counts as asked: it may have come back under another id, or never will.

        Args:
            online: the nodes that are online, in the order in which they are to be asked.
            late: the nodes that may still answer an earlier message, by its id; the first reply counts.
            others: whether nodes that were not asked before may take part.
        """
        missing = [node for node in self.nodes if node not in self._sums.nodes]
        fresh = [node for node in online if node not in self._asked] if others else []
        again = [*fresh, *(node for node in missing if node in online)][: len(missing)]
        self.nodes = [*(node for node in self.nodes if node in self._sums.nodes), *again]
        self._asked |= set(again)
        self.awaited, self.late = {}, {key: node for key, node in late.items() if node not in self._sums.nodes}
        self.messages = self._messages_to(sorted(again))

    def add_all(self, replies: Iterable[NodeReply]) -> None:
        """Check every reply as it arrives, and add those that are in line with the others once all are here."""
        for reply in replies:
            with self._working():
                self._take(reply)
            # Not to be held while the next one is awaited.
            del reply
        with self._working():
            self._add_candidates()

    def report(self) -> StageReport:
        """Return the outcomes so far."""
        return StageReport(
            self.request.stage,
            self._seconds,
            self._server_seconds,
            tuple(self._clients.values()),
            dict(self.stage.request.encodings),
        )

    def finish(self, metrics_fn: MetricsFn | None = None) -> StageResult:
        """Return the stage's result, once enough clients are in it.

        Args:
            metrics_fn: aggregates the clients' metrics; None for their weighted means.
        """
        with self._working():
            model, average = self._finish_stage()
            paths = self._bounded_paths()
        sums = self._sums
        path = sum(paths, start=PathSums())
        return StageResult(
            model,
            self.report(),
            self._aggregate(metrics_fn),
            path if path.points else None,
            paths,
            {name: value for name, value in weighted_means(sums.variance).items() if isinstance(value, float)},
            self.stage.layer_graph,
            average=average,
            cosines=sums.directions.finish if sums.directions else None,
            agreement=self._agreement,
        )

    def _finish_stage(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Return the stage's model and its mean by examples, as far as it has one.

        Where they are not finite, sum again without the client that is suspected most.
        """
        name = f"the model of the stage {self.stage.request.stage}"
        while True:
            try:
                model, average = self.stage.finish(), self.stage.average
                for state in (model, average or {}):
                    check_finite(changed(state, self._anchor), name, self._anchor)
            except (ArithmeticError, ValueError, RuntimeError) as error:
                if self.accepted - 1 < max(self.needed, 1):
                    raise StageFailedError(self.report(), error) from error
                suspect = max(self._sums.nodes, key=lambda node: self._candidates[node].measure.size)
                self._refuse(suspect, Refusal(Outcome.overflow, f"{type(error).__name__}: {error}"))
                self._add_candidates()
            else:
                self._note_shares()
                return model, average

    def _note_shares(self) -> None:
        """Add to the report of each client what the fusion has made of its update."""
        for node, note in zip(self._sums.nodes, self.stage.notes, strict=False):
            self._note(node, note)

    def _note(self, node: int, note: str) -> None:
        report = self._clients[node]
        self._clients[node] = replace(report, detail="; ".join(filter(None, (report.detail, note))))

    def _bounded_paths(self) -> tuple[PathSums, ...]:
        """Return the clients' paths; where they choose between models, as far as each client's claims count."""
        paths = self._sums.paths
        if not (self.limits.claims and self.stage.request.stage in CHOICES):
            return tuple(paths.values())
        bounded = bounded_claims(paths)
        for node, (_, note) in bounded.items():
            self._note(node, note)
        return tuple(bounded[node][0] if node in bounded else path for node, path in paths.items())

    def _aggregate(self, metrics_fn: MetricsFn | None) -> dict[str, float | list[float]]:
        if not self._sums.contents:
            return {}
        key = self.request.weight_key
        if metrics_fn is not None:
            return read_metrics(metrics_fn(self._sums.contents, key))
        return weighted_means(self._sums.metrics)

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

    def _busy(self) -> dict[str, int]:
        """Return the asked nodes that still work on an earlier round whose reply can be used, by the message's id."""
        return {
            key: message.node_id
            for key, message in self._unanswered.items()
            if message.node_id in self.nodes and is_usable(message.request, self.request, self.limits.late_rounds)
        }

    def _messages_to(self, nodes: list[int]) -> list[Message]:
        return self.request.to_messages(self._content, nodes)

    def _begin_sum(self) -> None:
        """Begin with no client in the sum."""
        self.stage = self._make()
        self._sums = _Sums()
        if self.stage.request.stage == Fuse.stage:
            self._sums.directions = UpdateDirections(self._anchor, self._previous)

    def _take(self, reply: NodeReply) -> None:
        """Check one reply; of a client that was asked several times the last outcome is reported."""
        key = reply.message.metadata.reply_to_message_id if reply.message else ""
        if key in self.late and reply.message and reply.message.has_error():
            return  # reported when its stage ended
        is_duplicate = reply.node_id in self._candidates
        self._clients[(reply.node_id, key) if is_duplicate else reply.node_id] = self._report(reply)

    def _report(self, reply: NodeReply) -> ClientReport:
        """Return the report of a reply, whose update waits for its verdict where it passes the checks."""
        try:
            return self._check(reply)
        except Refusal as refusal:
            problem = refusal
        except OSError:  # the server's own disk
            raise
        except Exception as error:  # noqa: BLE001 - whatever one client's reply brings about is that client's outcome
            _LOG.debug("node %d: %s", reply.node_id, error, exc_info=True)
            problem = Refusal(Outcome.not_handled, f"{type(error).__name__}: {error}")
        return ClientReport(
            reply.node_id,
            problem.outcome.name,
            # Names of a client's tensors may be as long as the whole reply.
            shortened(problem.detail),
            bytes_up=_payload_bytes(reply.message),
            bytes_down=self._bytes_down,
            seconds=reply.seconds,
        )

    def _check(self, node_reply: NodeReply) -> ClientReport:
        node = node_reply.node_id
        if node_reply.message is None:
            outcome = Outcome.left_out if node_reply.left_out else Outcome.timeout
            raise Refusal(outcome, node_reply.problem)
        if node in self._candidates:
            raise Refusal(Outcome.duplicate, f"node {node}")
        received = self._received(node_reply.message)
        path = checked_path(received.reply, self.request, node)
        variance = checked_variance(received.reply, self._anchor) if path else {}
        checked = self.stage.check(received.update)
        content = _app_content(node_reply.message.content)
        # Before anything is kept: a report that cannot be made leaves no trace.
        report = self._describe(node_reply, received, checked.alignment)
        sizes = measure(checked.update, checked.distances, self._anchor)
        self._candidates[node] = _Candidate(
            report, sizes, received.reply.metrics, content, path or PathSums(), variance
        )
        self._cohort.keep(node, checked.update)
        return report

    def _add_candidates(self) -> None:
        """Add the updates that are in line with the others; where adding fails, begin anew without that client."""
        if self.accepted:
            self._begin_sum()
        for node, verdict in self._judge().items():
            try:
                self._add(node, verdict)
            except Refusal as refusal:
                self._refuse(node, refusal)
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001 - as above; the sum may hold a part of the update
                self._refuse(node, Refusal(Outcome.not_handled, f"{type(error).__name__}: {error}"))
                self._begin_sum()
                self._add_candidates()
                return

    def _judge(self) -> dict[int, Verdict]:
        """Return the verdicts on the candidates; who is refused has no say in what is ordinary among the others."""
        while True:
            measures = {node: self._candidates[node].measure for node in self._cohort if node in self._candidates}
            if not self.limits.bounds:
                return {node: Verdict(measure.examples) for node, measure in measures.items()}
            if self._compares_updates:
                updates = {node: partial(self._cohort.__getitem__, node) for node in measures}
                self._agreement = direction_agreement(updates, measures, self._anchor)
            verdicts = judge(
                measures,
                self._anchor,
                shared_start=self._compares_updates,
                agreeing=self._agreement.agreeing,
                compared=self._compared,
            )
            refusals = {node: verdict.refusal for node, verdict in verdicts.items() if verdict.refusal is not None}
            refusals = refusals or self._contradicting_labels(verdicts)
            if not refusals:
                weights = self._agreement.weights
                return {node: verdict.with_weight(weights.get(node, 1.0)) for node, verdict in verdicts.items()}
            for node, refusal in refusals.items():
                self._refuse(node, refusal)

    def _contradicting_labels(self, verdicts: Mapping[int, Verdict]) -> dict[int, Refusal]:
        if self.stage.request.stage != RefitHead.stage:
            return {}
        return contradicting_labels({node: partial(self._bound, node, verdict) for node, verdict in verdicts.items()})

    def _bound(self, node: int, verdict: Verdict) -> Update:
        return verdict.apply(self._cohort[node], self._anchor)

    @property
    def _compares_updates(self) -> bool:
        """Return True if the clients have trained from one model, so that their updates can be compared."""
        request = self.stage.request
        return request.stage in (Fuse.stage, LocalSteps.stage) and request.start is Start.shared

    def _refuse(self, node: int, refusal: Refusal) -> None:
        """Turn a candidate down, whose report was that of an accepted client so far."""
        report = self._candidates.pop(node).report
        self._clients[node] = replace(report, outcome=refusal.outcome.name, detail=refusal.detail, metrics={})

    def _add(self, node: int, verdict: Verdict) -> None:
        candidate, sums = self._candidates[node], self._sums
        update = self._bound(node, verdict)
        self.stage.add(node, update)
        sums.nodes.append(node)
        if candidate.path.points:
            sums.paths[node] = candidate.path
        sums.variance.append((candidate.variance, 1.0))
        sums.metrics.append((candidate.metrics, update.examples))
        metrics = MetricRecord({**candidate.metrics, self.request.weight_key: update.examples})
        sums.contents.append(RecordDict({"metrics": metrics, **candidate.content}))
        self._complete_report(node, update, verdict)

    def _complete_report(self, node: int, update: Update, verdict: Verdict) -> None:
        """Add to a client's report what is known once its update is in the sum."""
        report = self._candidates[node].report
        notes = [report.detail, *verdict.notes]
        report = replace(report, examples=update.examples, detail="; ".join(note for note in notes if note))
        if self._client_metrics_fn is not None:
            metrics = self._client_metrics_fn(node, update.parameters)
            report = replace(report, metrics={**report.metrics, **metrics})
        # Where the server aligns, the parameters of the reply are not those that went into the sum.
        if self._sums.directions is not None and (self.request.aligns or report.alignment is None):
            norm, cosine = self._sums.directions.add(update.parameters)
            report = replace(report, update_norm=norm, update_cosine=cosine)
        self._clients[node] = report

    def _received(self, message: Message) -> Received:
        """Decode a reply to this request, or to an earlier one: then with less weight."""
        earlier = self._unanswered.get(message.metadata.reply_to_message_id)
        if earlier is None or earlier.request.round == self.request.round:
            return receive(message, self.request, self.limits.max_update_bytes)
        if not is_usable(earlier.request, self.request, self.limits.late_rounds):
            raise Refusal(Outcome.late, f"it answers round {earlier.request.round}")
        received = receive(message, earlier.request, self.limits.max_update_bytes)
        age = self.request.round - earlier.request.round
        return replace(received, update=received.update.scaled(staleness_weight(age)))

    def _describe(self, node_reply: NodeReply, received: Received, aligned: AlignmentReport | None) -> ClientReport:
        reply = received.reply
        alignment = reply.alignment if aligned is None and self.request.aligns else aligned
        return ClientReport(
            node_reply.node_id,
            Outcome.accepted.name,
            self._remark(reply),
            received.update.examples,
            reply.payload_bytes,
            self._bytes_down,
            node_reply.seconds,
            reply.train_seconds,
            alignment,
            reply.scalars,
            reply.probe_seconds,
            reply.probe_bytes,
            judges=reply.judges,
        )

    def _remark(self, reply: Reply) -> str:
        """Return what is to be said of an accepted reply."""
        age = self.request.round - reply.round
        remarks = [f"{age} round{'s' * (age > 1)} late"] if age else []
        if self.request.aligns and not reply.has_mod:
            remarks.append(f"not aligned: {LACKS_MOD}")
        if self.request.optional and not reply.has_mod:
            remarks.append(f"{CANNOT_REPORT}: {LACKS_MOD}")
        elif self.request.optional and reply.detail:
            remarks.append(f"{CANNOT_REPORT}: {shortened(reply.detail)}")
        return "; ".join(remarks)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A client whose update has passed the checks and waits for its verdict.

    Attributes:
        report: its report before the verdict.
        measure: the sizes of its update.
        metrics: what its app returned.
        content: the app's own records.
        path: its sums along the requested path.
        variance: its variance ratios.
    """

    report: ClientReport
    measure: Measure
    metrics: Metrics
    content: RecordDict
    path: PathSums
    variance: Mapping[str, float]


@dataclass(eq=False)
class _Sums:
    """Sums over the accepted clients beside the stage's own."""

    nodes: list[int] = field(default_factory=list)
    contents: list[RecordDict] = field(default_factory=list)
    metrics: list[tuple[Metrics, float]] = field(default_factory=list)
    paths: dict[int, PathSums] = field(default_factory=dict)
    variance: list[tuple[Mapping[str, float], float]] = field(default_factory=list)
    directions: UpdateDirections | None = None


def _array_bytes(content: RecordDict) -> int:
    return sum(packing.nbytes(record) for record in records(content, ArrayRecord).values())


def _payload_bytes(message: Message | None) -> int:
    return 0 if message is None or message.has_error() else _array_bytes(message.content)


def _app_content(content: RecordDict) -> RecordDict:
    """Return the app's own records, which a function that aggregates metrics reads beside the metrics."""
    return RecordDict(
        {
            name: record
            for name, record in content.items()
            if not isinstance(record, ArrayRecord | MetricRecord) and name != HEADER
        }
    )
