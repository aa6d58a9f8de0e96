"""Stages as Flower messages: `requests` writes a stage's question, `receive` reads one answer.

An answer becomes an `Update`, or is refused by name.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, plain, wire
from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import BatchNorm, Block, LayerGraph
from fedbasin.strategies.alignment.pairwise_merging import Link
from fedbasin.strategies.alignment.weight_matching import AlignmentReport
from fedbasin.strategies.encodings import encoding_messages, read_encodings, statistics
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.recipes import Statistic, Target
from fedbasin.strategies.round.outcomes import Outcome, Refusal
from fedbasin.strategies.round.stages import Ask, Fitting, Kind, Stage, Start
from fedbasin.strategies.tensors.state import State

_START = {Start.shared: pb.START_SHARED, Start.own: pb.START_OWN}
_KIND = {
    Statistic.none: pb.PRECISION_KIND_SCALAR,
    Statistic.fisher: pb.PRECISION_KIND_DIAGONAL,
    Statistic.gram: pb.PRECISION_KIND_GRAM,
    Statistic.kronecker: pb.PRECISION_KIND_KRONECKER,
}
_TARGET = {
    Target.features: pb.FIT_TARGET_FEATURES,
    Target.weights: pb.FIT_TARGET_WEIGHTS,
    Target.labels: pb.FIT_TARGET_LABELS,
}
# Where a message's config says which factor of its adapters a client leaves as it is: "lora_A" or "lora_B".
FROZEN = "frozen-factor"
# Flower's codes of an app that does not load, that raised, whose mod refused, that is invalid, that crashed;
# the others are the SuperLink's.
_CLIENT_ERRORS = {1, 2, 6, 7, 8}


@dataclass(frozen=True, eq=False)
class Broadcast:
    """One stage's question, written once for all clients.

    Attributes:
        kind: which of the app's functions answers.
        content: what every message carries.
        header: the request in it.
        payload_bytes: size of the tensors in it.
    """

    kind: Kind
    content: RecordDict
    header: pb.Request
    payload_bytes: int


def broadcast(
    stage: Stage,
    anchor: State,
    server_round: int,
    config: ConfigRecord,
    *,
    packed: bool = True,
    digest: bytes | None = None,
    probe_bound: int | None = None,
) -> Broadcast:
    """Write a stage's question.

    Args:
        stage: whose question it is.
        anchor: the global model of this round.
        server_round: from 1.
        config: the app's own settings for its clients; "server-round" is added to a copy, and "frozen-factor"
            where the stage freezes one.
        packed: lay the tensors out as few flat arrays. Flower's wrappers compare messages tensor by
            tensor and need them plain; a deployed round is then slower by the number of tensors.
        digest: of the anchor, where it is known.
        probe_bound: the largest draw with which a client still evaluates the path
            (`diagnostics.share`); None for all clients.
    """
    header = _question(stage, server_round, digest or packing.digest(anchor), probe_bound)
    content = RecordDict({"config": _settings(config, server_round, stage.ask.frozen)})
    _write_tensors(stage.ask, anchor, header, content, packed=packed)
    wire.write(content, header)
    return Broadcast(stage.kind, content, header, _nbytes(content))


def _question(stage: Stage, number: int, digest: bytes, probe_bound: int | None) -> pb.Request:
    """All of a question that is no tensor."""
    ask = stage.ask
    return pb.Request(
        round=number,
        stage=stage.name,
        start=_START[ask.start],
        anchor_digest=digest,
        align=ask.symmetry is not None,
        symmetry=str(ask.symmetry or ""),
        precision=_KIND[ask.statistic],
        shrink=ask.shrink,
        path_points=ask.path_points,
        order=ask.layer_graph,
        keep=ask.keep,
        probe_bound=probe_bound,
        matcher=ask.matcher.name,
        blocks=[pb.Block(tensors=block) for block in ask.blocks],
        encodings=encoding_messages(ask.encodings),
        fit=None if ask.fit is None else _fit(ask.fit),
    )


def _settings(config: ConfigRecord, number: int, frozen: str) -> ConfigRecord:
    """The app's own, and what it is told of the round."""
    told = {FROZEN: frozen} if frozen else {}
    return ConfigRecord({**config, "server-round": number, **told})


def _write_tensors(
    ask: Ask, anchor: State, header: pb.Request, content: RecordDict, *, packed: bool
) -> None:
    """The anchor, and what goes with it; the header says where each tensor lies."""
    if packed:
        content[wire.ARRAYS], specs = packing.pack(anchor)
        header.anchor.extend(specs)
    else:
        content[wire.ARRAYS] = plain.write(anchor)
    if ask.link is not None:
        _write_link(ask.link, header, content)
    if ask.radii:
        content[wire.RADII], specs = packing.pack(ask.radii)
        header.radii.extend(specs)


def _write_link(link: Link, header: pb.Request, content: RecordDict) -> None:
    if link.anchor is not None:
        header.merged_examples = link.anchor.examples
    if link.moving is not None:
        header.moving_examples = link.moving.examples
        content[wire.MOVING], specs = packing.pack(link.moving.model)
        header.moving.extend(specs)


def _fit(ask: Fitting) -> pb.Fit:
    blocks = [pb.Block(tensors=block) for block in ask.blocks]
    target = pb.FIT_TARGET_UNSPECIFIED if ask.target is None else _TARGET[ask.target]
    path = None if ask.along is None else pb.Along(share=ask.along.share, reach=ask.along.reach)
    norms = [pb.Norm(name=norm.name, eps=norm.eps) for norm in ask.norms]
    return pb.Fit(blocks=blocks, target=target, sequence=ask.sequence, path=path, norms=norms)


def requests(sent: Broadcast, nodes: Iterable[int]) -> list[Message]:
    """One message for every node, all with the same content, which Flower uploads once."""
    # The mod itself answers of fits, and an app need not have a function to evaluate.
    kind = "train" if sent.header.HasField("fit") else sent.kind
    return [
        Message(
            content=sent.content,
            dst_node_id=node,
            message_type=kind,
            group_id=str(sent.header.round),
        )
        for node in nodes
    ]


@dataclass(frozen=True, eq=False)
class Received:
    """One client's answer, decoded but not yet checked against the anchor's numbers."""

    update: Update
    header: pb.UpdateHeader
    metrics: dict[str, float]
    payload_bytes: int


def receive(message: Message, sent: Broadcast, max_bytes: int) -> Received:
    """Decode one reply to a stage's question; tensors are views of the reply's own bytes.

    Raises:
        Refusal: the reply is an error, does not parse, answers something else or is too large.
    """
    if sent.kind == "evaluate":
        return _receive_evaluation(message, sent.header)
    metrics = receive_metrics(message).metrics
    content = message.content
    header = _header(content, sent.header)
    size = _nbytes(content)
    if size > max_bytes:
        raise Refusal(Outcome.too_large, f"{size} bytes where {max_bytes} are allowed")
    try:
        encodings = read_encodings(sent.header.encodings)
        update = (
            _fitted(content, header, encodings)
            if sent.header.HasField("fit")
            else _update(content, header, sent.header.precision, encodings)
        )
    except packing.PackingError as error:
        raise Refusal(Outcome.malformed, str(error)) from error
    return Received(update, header, metrics, size)


def _update(
    content: RecordDict, header: pb.UpdateHeader, kind: int, encodings: Mapping[Block, Encoding]
) -> Update:
    parameters = _parameters(content, header)
    precisions = statistics(content, header, kind, encodings).precisions
    return Update(parameters, header.examples, precisions, layer_graph=_order(header))


def _order(header: pb.UpdateHeader) -> LayerGraph | None:
    if not header.levels:
        return None
    levels = (tuple(tuple(block.tensors) for block in level.blocks) for level in header.levels)
    norms = tuple(BatchNorm(norm.name, norm.eps) for norm in header.norms)
    return LayerGraph(tuple(levels), tuple(header.head.tensors) or None, norms)


def _fitted(
    content: RecordDict, header: pb.UpdateHeader, encodings: Mapping[Block, Encoding]
) -> Update:
    """Sums without weights: what layers are fitted to; and running statistics, where they were asked for."""
    if header.lost:
        raise Refusal(Outcome.lost_model, f"round {header.round}, {header.stage}")
    found = statistics(content, header, pb.PRECISION_KIND_GRAM, encodings)
    measured = _parameters(content, header) if header.tensors else {}
    return Update(measured, header.examples, found.precisions, found.moments)


def _receive_evaluation(message: Message, asked: pb.Request) -> Received:
    """Metrics, and the path to the client's own model where it was asked for and the client still has that."""
    received = receive_metrics(message)
    if not (asked.path_points and wire.has_header(message.content)):
        return received
    said = _header(message.content, asked)
    if said.lost:
        raise Refusal(Outcome.lost_model, f"round {said.round}, {said.stage}")
    header = pb.UpdateHeader(
        examples=received.update.examples,
        path=said.path,
        variance=said.variance,
        probe_seconds=said.probe_seconds,
    )
    return replace(received, header=header)


def receive_metrics(message: Message) -> Received:
    """Decode a reply of which only the metrics are wanted, as an evaluation's.

    Raises:
        Refusal: the reply is an error.
    """
    if message.has_error():
        raise Refusal(*_error(message))
    metrics = {
        name: value
        for record in wire.records(message.content, MetricRecord).values()
        for name, value in wire.numbers(record).items()
    }
    examples = metrics.pop("num-examples", 0.0)
    return Received(Update({}, examples), pb.UpdateHeader(examples=examples), metrics, 0)


def _nbytes(content: RecordDict) -> int:
    return sum(packing.nbytes(record) for record in wire.records(content, ArrayRecord).values())


def _error(message: Message) -> tuple[Outcome, str]:
    code, reason = message.error.code, message.error.reason or "no reason given"
    outcome = Outcome.client_error if code in _CLIENT_ERRORS else Outcome.unavailable
    return outcome, f"error {code}: {reason}"


def _header(content: RecordDict, asked: pb.Request) -> pb.UpdateHeader:
    try:
        header = wire.read_update(content)
    except wire.SchemaVersionError as error:
        raise Refusal(Outcome.schema_version, str(error)) from error
    except wire.WireError as error:
        raise Refusal(Outcome.malformed, str(error)) from error
    if (header.round, header.stage) != (asked.round, asked.stage):
        answered = f"round {header.round}, {header.stage or 'no stage'}"
        raise Refusal(
            Outcome.wrong_round, f"{answered}; this is round {asked.round}, {asked.stage}"
        )
    if header.anchor_digest != asked.anchor_digest:
        raise Refusal(
            Outcome.wrong_anchor, f"digest {header.anchor_digest.hex()[:12] or 'missing'}"
        )
    symmetry = hashlib.sha256(asked.symmetry.encode()).digest() if asked.align else b""
    if header.symmetry_digest != symmetry:
        raise Refusal(Outcome.symmetry_mismatch, f"digest {header.symmetry_digest.hex()[:12]!r}")
    if header.function_changed:
        change = header.alignment.endpoint_error
        raise Refusal(Outcome.function_changed, f"its own loss changed by {change:.2g} of itself")
    return header


def _parameters(content: RecordDict, header: pb.UpdateHeader) -> dict[str, Tensor]:
    record = wire.records(content, ArrayRecord).get(wire.ARRAYS)
    if record is None:
        raise Refusal(Outcome.missing_tensor, f"the reply has no record {wire.ARRAYS!r}")
    return packing.unpack(record, header.tensors) if header.tensors else plain.read(record)


def alignment_message(report: AlignmentReport, seconds: float = 0.0) -> pb.AlignmentReport:
    """How an alignment went, as it is sent and reported."""
    return pb.AlignmentReport(
        spaces=[
            pb.SpaceReport(
                space=s.space,
                certified=s.certified,
                moved=s.moved,
                gain=s.gain,
                fixed_points=s.fixed_points,
                largest_angle=s.largest_angle,
                skew_before=s.skew_before,
                skew_after=s.skew_after,
            )
            for s in report.spaces
        ],
        sweeps=report.sweeps,
        distance_before=report.distance_before,
        distance_after=report.distance_after,
        seconds=seconds,
        decision=report.decision.name,
    )
