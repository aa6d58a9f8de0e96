"""The reply of a client to one request, and the message that carries it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, plain
from fedbasin.proto.convert import ConversionError, from_protobuf, to_protobuf
from fedbasin.proto.header import (
    HEADER,
    STATISTICS,
    HeaderBound,
    WireError,
    array_record,
    read_header,
    records,
    write_header,
)
from fedbasin.proto.layer_graph import Block, LayerGraph
from fedbasin.proto.report import AlignmentReport, LayerVariance, PathSums
from fedbasin.proto.request import Request, State

Metrics: TypeAlias = Mapping[str, float | list[float]]


@dataclass(frozen=True, eq=False)
class LayerStatistic:
    """A statistic of one layer that a client sends beside its weights.

    Attributes:
        block: names of the layer's tensors.
        kind: `fisher`, `gram` or `kronecker`.
        pieces: the tensors of the statistic, in the order of its form; none where it has another layer's.
        moment: the tensors of the cross-moment, in the order of its form; none where nothing is fitted.
        same: place in the list of an earlier layer that reads the same inputs and has the same Gram matrix; None
            where the statistic is the layer's own.
    """

    block: Block
    kind: str
    pieces: tuple[Tensor, ...] = field(default=(), metadata={"record": STATISTICS})
    moment: tuple[Tensor, ...] = field(default=(), metadata={"record": STATISTICS})
    same: int | None = None


@dataclass(frozen=True, eq=False)
class Reply:
    """One client's reply to a request.

    Attributes:
        round: number of the request's round.
        stage: name of the request's stage.
        anchor_digest: digest of the anchor that the client worked from.
        symmetry_digest: digest of the symmetry that the client aligned by; empty where nothing was aligned.
        parameters: the client's tensors; None where none are sent.
        statistics: what the client knows about its weights, layer by layer.
        alignment: report of the alignment; None where nothing was aligned.
        path: loss along the path from the sent model to the client's; None where none was requested.
        train_seconds: duration of the app's own function.
        function_changed: whether alignment changed the function of the model, so that no tensors are sent.
        probe_seconds: duration of the diagnostics.
        variance: variance ratios by layer, with the path from the fused model.
        layer_graph: the layers of the model in the order of use; None where that was not requested.
        lost: whether the client has not kept the models that the request builds on.
        outcome: name of the outcome that the client found for its own model by the server's rules, so that no tensors are
            sent; empty where the model passes them.
        detail: what and where, in one line, beside an outcome; or why the reply lacks layers that were optional.
        judges: whether the client keeps examples that its app does not train on, and can evaluate models on them.
        metrics: what the app's own function returned, without the client's weight.
        examples: the client's weight.
        payload_bytes: bytes of the message's arrays.
        has_mod: whether the client runs the mod; False for an ordinary app.
    """

    round: int
    stage: str
    anchor_digest: bytes = b""
    symmetry_digest: bytes = b""
    parameters: State | None = field(default=None, metadata={"record": "arrays"})
    statistics: tuple[LayerStatistic, ...] = field(default=(), metadata={"record": STATISTICS})
    alignment: AlignmentReport | None = None
    path: PathSums | None = None
    train_seconds: float = 0.0
    function_changed: bool = False
    probe_seconds: float = 0.0
    variance: tuple[LayerVariance, ...] = ()
    layer_graph: LayerGraph | None = None
    lost: bool = False
    outcome: str = ""
    detail: str = ""
    judges: bool = False
    metrics: Metrics = field(default_factory=dict, metadata={"local": True})
    examples: float = field(default=0.0, metadata={"local": True})
    payload_bytes: int = field(default=0, metadata={"local": True})
    has_mod: bool = field(default=True, metadata={"local": True})

    def to_content(self, request: Request, *, packed: bool = False) -> RecordDict:
        """Return the content of a message that carries the reply.

        Args:
            request: the request that is answered; names the records.
            packed: whether the parameters travel as one flat array per dtype, as the request did.

        Raises:
            PackingError: a tensor has a dtype that cannot be sent.
        """
        header = to_protobuf(self, pb.Reply())
        metrics = MetricRecord({**self.metrics, request.weight_key: self.examples})
        content = RecordDict({"metrics": metrics})
        if self.parameters is not None and packed:
            content[request.arrays_key], specs = packing.pack(self.parameters)
            header.parameters.extend(specs)
        elif self.parameters is not None:
            content[request.arrays_key] = plain.write_arrays(request.for_app(self.parameters))
        if self.statistics:
            content[STATISTICS] = _write_statistics(self.statistics, header)
        write_header(content, header)
        return content

    @classmethod
    def from_message(cls, content: RecordDict, request: Request, *, trusted: bool = False) -> "Reply":
        """Read a reply from the content of a message; tensors are views of the message's bytes.

        Args:
            content: the content, as `to_content` makes it, or as an app without the mod replies.
            request: the request that was sent.
            trusted: whether the reader has written the content itself, so that its header is not bounded. What a client
                keeps answers an earlier stage than the one that reads it, and may be larger than any answer to that.

        Raises:
            WireError: the header does not parse or is of another version.
            PackingError: the tensors do not parse.
        """
        arrays = records(content, ArrayRecord)
        metrics = _metrics(content)
        weight = metrics.pop(request.weight_key, 0.0)
        # An app without the mod may reply with the config that it was sent, and the request's header lies in that.
        has_mod = HEADER in records(content, ConfigRecord)
        bound = None if trusted else _bound(request)
        reply = _typed(content, request, bound) if has_mod else _ordinary(arrays, request)
        return replace(
            reply,
            metrics=metrics,
            examples=float(weight) if isinstance(weight, int | float) else 0.0,
            payload_bytes=sum(packing.nbytes(record) for record in arrays.values()),
        )

    @property
    def scalars(self) -> dict[str, float]:
        """The metrics that are single numbers."""
        return {name: float(v) for name, v in self.metrics.items() if isinstance(v, int | float)}

    @property
    def probe_bytes(self) -> int:
        """Bytes that the diagnostics take of the header."""
        probes = Reply(0, "", path=self.path, variance=self.variance)
        header = to_protobuf(probes, pb.Reply())
        vectors = self.alignment.singular_vectors if self.alignment else None
        spectral = to_protobuf(vectors, pb.SingularVectors()).ByteSize() if vectors else 0
        return header.ByteSize() + spectral if self.path or self.variance or vectors else 0


def _typed(content: RecordDict, request: Request, bound: HeaderBound | None) -> Reply:
    """Read the header of a client with the mod, and the tensors that it names."""
    header = read_header(content, pb.Reply(), bound)
    try:
        reply = from_protobuf(Reply, header)
    except ConversionError as error:
        raise WireError(str(error)) from error
    record = records(content, ArrayRecord).get(request.arrays_key)
    parameters: State | None = None
    if header.parameters:
        parameters = packing.unpack(array_record(content, request.arrays_key), header.parameters)
    elif record is not None:
        parameters = request.from_app(plain.read_arrays(record))
    # A client keeps its replies without this record; whoever needs statistics checks that they came.
    has_statistics = STATISTICS in records(content, ArrayRecord)
    statistics = tuple(_read_statistics(content, header)) if has_statistics else ()
    return replace(reply, parameters=parameters, statistics=statistics)


def _bound(request: Request) -> HeaderBound:
    """Return the largest header that a reply to this request can have.

    For each tensor there may be its place in a packed record, a statistic, its layer in the graph, its variance and
    its space; names occur several times.
    """
    tensors = {*request.anchor, *request.moving}
    names = sum(map(len, tensors)) + len(request.symmetry)
    sizes = 2**12 + 1024 * len(tensors) + 64 * request.path_points
    return HeaderBound(sizes + 32 * names, 64 + 16 * len(tensors) + request.symmetry.count("\n"))


def _ordinary(arrays: Mapping[str, ArrayRecord], request: Request) -> Reply:
    """Read the reply of an app without the mod: one record of arrays, of any name."""
    parameters: State | None = None
    if len(arrays) == 1:
        (record,) = arrays.values()
        parameters = request.from_app(plain.read_arrays(record))
    return Reply(request.round, request.stage, request.anchor_digest, parameters=parameters, has_mod=False)


def read_metrics(record: MetricRecord) -> dict[str, float | list[float]]:
    """Return the metrics of a record, numbers and lists of numbers.

    Raises:
        WireError: a metric is none, or is larger than any float.
    """
    return {name: _number(name, value) for name, value in record.items()}


def _number(name: str, value: object) -> float | list[float]:
    try:
        return float(value) if isinstance(value, int | float) else [float(v) for v in value]  # type: ignore[attr-defined]
    except (OverflowError, TypeError, ValueError) as error:
        raise WireError(f"the metric {name!r} is no number that a float can hold: {error}") from error


def _metrics(content: RecordDict) -> dict[str, float | list[float]]:
    """Return the metrics of all records; raises a WireError where two of them give one metric."""
    metrics: dict[str, float | list[float]] = {}
    for where, record in records(content, MetricRecord).items():
        if twice := metrics.keys() & record.keys():
            raise WireError(f"the metric {min(twice)!r} is in {where!r} and in another record; give it once")
        metrics |= read_metrics(record)
    return metrics


def _write_statistics(statistics: tuple[LayerStatistic, ...], header: pb.Reply) -> ArrayRecord:
    tensors = {
        f"{number} {part} {index}": tensor
        for number, statistic in enumerate(statistics)
        for part, pieces in (("piece", statistic.pieces), ("moment", statistic.moment))
        for index, tensor in enumerate(pieces)
    }
    record, packed = packing.pack(tensors)
    specs = iter(packed)
    for statistic in statistics:
        entry = to_protobuf(statistic, header.statistics.add())
        entry.pieces.extend(next(specs) for _ in statistic.pieces)
        entry.moment.extend(next(specs) for _ in statistic.moment)
    return record


def _read_statistics(content: RecordDict, header: pb.Reply) -> Iterator[LayerStatistic]:
    specs = [s for entry in header.statistics for s in (*entry.pieces, *entry.moment)]
    tensors = packing.unpack(array_record(content, STATISTICS), specs)
    for entry in header.statistics:
        yield replace(
            from_protobuf(LayerStatistic, entry),
            pieces=tuple(tensors[spec.name] for spec in entry.pieces),
            moment=tuple(tensors[spec.name] for spec in entry.moment),
        )
