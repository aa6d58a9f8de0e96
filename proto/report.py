"""Reports of a round: what was measured, and the outcome of every client's reply.

A run writes one `RoundReport` a round to its folder and to the observer; everything that is shown of a run is
computed from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.convert import ConversionError, from_protobuf, to_protobuf
from fedbasin.proto.encoding import Encoding
from fedbasin.proto.layer_graph import Block

SCHEMA_VERSION: int = pb.SCHEMA_VERSION
ACCEPTED = "accepted"


class ReportError(ValueError):
    """Bytes or JSON that are not a round report of this version."""


class Decision(Enum):
    """The result of aligning one client, and its reason."""

    certified = "nothing was searched: the identity is proven best at every space"
    identity = "searched: nothing agrees better with the anchor than the client as it is"
    aligned = "moved: the client agrees better with the anchor in another order or frame"


@dataclass(frozen=True)
class SpaceReport:
    """The alignment of one space of a client's model.

    Attributes:
        space: name of the space.
        certified: whether the identity was proven optimal, so that nothing was searched.
        moved: distance of the element from the identity, 0 to 1: share of the units that changed place, or of a
            rotation's Frobenius norm.
        gain: rise of the matching objective, as a share of `||anchor|| ||client||` over the space's tensors.
        fixed_points: share of the units that stayed in their place.
        largest_angle: largest angle of the rotations, in radians; None where units only change places.
        skew_before: skew ratio of the agreement of anchor and client when the search reached the space, 0 to 2; None
            where nothing can rotate.
        skew_after: skew ratio at the end of the search; near 0 where a rotation was found exactly.
    """

    space: str
    certified: bool
    moved: float
    gain: float
    fixed_points: float = 1.0
    largest_angle: float | None = None
    skew_before: float | None = None
    skew_after: float | None = None


@dataclass(frozen=True)
class SingularVectors:
    """Agreement of the singular vectors of client and anchor, over the matrices that a budget pays for.

    Attributes:
        before: agreement before alignment, 0 to 1.
        after: agreement after alignment.
        measured: number of matrices that were measured.
        matrices: number of matrices that the model has.
    """

    before: float
    after: float
    measured: int
    matrices: int


@dataclass(frozen=True)
class AlignmentReport:
    """The alignment of one client's model to the anchor.

    Attributes:
        spaces: a report for each space, in the symmetry's order.
        sweeps: passes over the spaces.
        distance_before: Euclidean distance from client to anchor before alignment, over all tensors that count in
            matching; running statistics do not.
        distance_after: the distance after alignment; matching by weights never raises it.
        seconds: duration of the alignment.
        endpoint_error: relative difference of the client's own loss before and after alignment, which only rounding
            may cause; None where it was not measured.
        singular_vectors: None where they were not measured.
    """

    spaces: tuple[SpaceReport, ...] = ()
    sweeps: int = 0
    distance_before: float = 0.0
    distance_after: float = 0.0
    seconds: float = 0.0
    endpoint_error: float | None = None
    singular_vectors: SingularVectors | None = None

    @property
    def decision(self) -> Decision:
        """The result that the reports of all spaces give together."""
        if any(space.moved for space in self.spaces):
            return Decision.aligned
        proven = all(space.certified for space in self.spaces)
        return Decision.certified if proven else Decision.identity


@dataclass(frozen=True)
class LayerVariance:
    """The variance of the fused model's preactivations in one layer, relative to the client's own.

    Attributes:
        layer: name of the layer's weight.
        ratio: variance of the fused model over the squared deviation of the client's; 1 if nothing collapsed.
    """

    layer: str
    ratio: float


@dataclass(frozen=True)
class PathSums:
    """Sums over one or more clients' examples along the straight line from a model (t = 0) to the client's (t = 1).

    In the path from the fused model the curves `before` are empty. So they are in a trial, which has no such line: its
    t goes from before a client's first local steps to after them.

    Attributes:
        points: values of t.
        loss_before: sums of the loss, client's model as trained.
        loss_after: sums of the loss, client's model as aligned.
        correct_before: numbers of examples classified correctly, as trained.
        correct_after: numbers of examples classified correctly, as aligned.
        examples: number of examples.
        clients: number of clients in the sums.
    """

    points: tuple[float, ...] = ()
    loss_before: tuple[float, ...] = ()
    loss_after: tuple[float, ...] = ()
    correct_before: tuple[float, ...] = ()
    correct_after: tuple[float, ...] = ()
    examples: float = 0.0
    clients: int = 0

    def __add__(self, other: "PathSums") -> "PathSums":
        """Return the sums over the clients of both; the empty sums are neutral."""
        if not self.points or not other.points:
            return other if not self.points else self

        def add(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
            # What one client has not counted is not known of both.
            if not (a and b):
                return ()
            return tuple(x + y for x, y in zip(a, b, strict=True))

        return PathSums(
            self.points,
            add(self.loss_before, other.loss_before),
            add(self.loss_after, other.loss_after),
            add(self.correct_before, other.correct_before),
            add(self.correct_after, other.correct_after),
            self.examples + other.examples,
            self.clients + other.clients,
        )


@dataclass(frozen=True)
class ClientReport:
    """The outcome of one client's reply to one request.

    Attributes:
        node_id: Flower's id of the node that was asked.
        outcome: name of a `fedbasin.strategies.judging.outcomes.Outcome`.
        detail: what and where, in one line; empty for accepted replies.
        examples: weight of the client's update.
        bytes_up: bytes of the reply's arrays.
        bytes_down: bytes of the request's arrays.
        seconds: from sending the request to receiving the reply.
        train_seconds: duration of the app's own function, by the client's clock.
        alignment: None where nothing was aligned.
        metrics: what the app's own function returned.
        probe_seconds: duration of the client's diagnostics.
        probe_bytes: bytes of the diagnostics in the reply.
        update_norm: Euclidean norm of client less anchor; None where it was not measured.
        update_cosine: cosine of the update and the movement of the round before.
        judges: whether the client keeps examples that its app does not train on, and can evaluate models on them.
    """

    node_id: int
    outcome: str
    detail: str = ""
    examples: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    alignment: AlignmentReport | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    probe_seconds: float = 0.0
    probe_bytes: int = 0
    update_norm: float | None = None
    update_cosine: float | None = None
    judges: bool = False

    @property
    def is_accepted(self) -> bool:
        """True if the reply is part of the round's sum."""
        return self.outcome == ACCEPTED


@dataclass(frozen=True)
class StageReport:
    """One request to some clients, and what became of it.

    Attributes:
        stage: name of the stage.
        seconds: from sending the first request to the end of the stage.
        server_seconds: time that the server spent on preparing, decoding, checking, adding and solving.
        clients: a report for each client that was asked.
        encodings: how Gram matrices were requested, by layer.
    """

    stage: str
    seconds: float = 0.0
    server_seconds: float = 0.0
    clients: tuple[ClientReport, ...] = ()
    encodings: Mapping[Block, Encoding] = field(default_factory=dict)

    @property
    def accepted(self) -> tuple[ClientReport, ...]:
        """The clients whose replies are part of the sum."""
        return tuple(client for client in self.clients if client.is_accepted)


@dataclass(frozen=True)
class UpdateCosines:
    """Cosines between the accepted clients' updates, from the same sampled entries of every update.

    Attributes:
        clients: number of clients.
        entries: number of entries that were sampled.
        total_entries: number of entries that the model has.
        norm: Euclidean norm of an update, mean of clients.
        fused: cosine with the movement of the global model in this round, mean of clients.
        previous: cosine with the movement in the round before, mean of clients.
        clients_mean: cosine between two clients, mean of all pairs.
        seconds: duration of the measurement.
    """

    clients: int
    entries: int
    total_entries: int
    norm: float | None = None
    fused: float | None = None
    previous: float | None = None
    clients_mean: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class ProbedPath:
    """The path between two models on the server's probe set; only the curves `after` are filled.

    Attributes:
        a: node id of the model at t = 0; 0 for the fused model.
        b: node id of the model at t = 1.
        path: sums along the path.
    """

    a: int
    b: int
    path: PathSums


@dataclass(frozen=True)
class ServerProbe:
    """Measurements of some accepted clients' aligned models on the server's own probe set.

    Attributes:
        nodes: ids of the nodes whose models were kept.
        accepted: number of accepted clients.
        pairs: paths between any two of the models.
        fused: paths from the fused model to each.
        ensemble_loss: loss of the models' mean probability; NaN where the task has no probabilities.
        ensemble_accuracy: accuracy of the models' mean probability; NaN where the task has no probabilities.
        seconds: duration of the measurement.
        spooled_bytes: bytes written to disk.
    """

    nodes: tuple[int, ...] = ()
    accepted: int = 0
    pairs: tuple[ProbedPath, ...] = ()
    fused: tuple[ProbedPath, ...] = ()
    ensemble_loss: float = 0.0
    ensemble_accuracy: float = 0.0
    seconds: float = 0.0
    spooled_bytes: int = 0


class IncidentKind(Enum):
    """A kind of incident. The name is the metric's label, the value is the remedy."""

    rolled_back = (
        "the round's model is not used; look for the clients that the report names, and lower the learning rate"
    )
    loss_rose = "the new global model is worse than the one before; lower the learning rate, or let clients train less"
    client_loss = "one client's loss is out of line; look at its data, and lower its learning rate"
    update_norm = (
        "one client's update is much longer than most, and its report says what was cut back; lower its learning rate, "
        "unless it has far more data"
    )
    quarantined = "the client's replies were refused again and again; mend it before its quarantine ends"
    damaged_checkpoint = "a file does not have the checksum that it was written with; look at the disk"


@dataclass(frozen=True)
class Incident:
    """Something out of line that the guard of a round has seen.

    Attributes:
        kind: name of an `IncidentKind`.
        detail: what and where, in one line.
    """

    kind: str
    detail: str


class Origin(Enum):
    """The origin of a model that a round serves or trains on."""

    average = "the mean of the clients' models"
    fitted = "a point between the mean and the model with fitted layers, or beyond"
    client = "one client's model with a closed-form head"
    stepped = "the model served until then after further local steps, with a closed-form head"
    weighted = "a point between the mean and the one weighted by the clients' statistics"
    products = "a point between the mean of the adapters' products and the one weighted by their inputs"
    kept = "the model of an earlier round, which no model of this round matches"


@dataclass(frozen=True)
class Choice:
    """The models that a round has chosen: the one that is served, and the one that the next round trains on.

    Losses and accuracies are means over examples that no layer was fitted to.

    Attributes:
        served: name of an `Origin`.
        served_round: number of the round that the served model is of.
        trained_on: name of an `Origin`.
        loss: loss of the served model.
        accuracy: its accuracy; None where the task has no right and wrong.
        average_loss: loss of the mean of this round's clients' models.
        average_accuracy: its accuracy.
        examples: number of examples of the comparison.
        pause: number of rounds without a comparison that follow.
        scale: factor of the outputs of the served model's last layer, where the model was too sure of them; None for 1.
        scale_gain: part of the loss that this factor has removed.
    """

    served: str
    served_round: int
    trained_on: str
    loss: float
    accuracy: float | None = None
    average_loss: float = 0.0
    average_accuracy: float | None = None
    examples: float = 0.0
    pause: int = 0
    scale: float | None = None
    scale_gain: float = 0.0


@dataclass(frozen=True)
class Step:
    """How far a round has gone beyond the mean of the clients' models, judged by examples that nobody trains on.

    Attributes:
        momentum: share of the last round's move that was added to the mean.
        length: the step from the global model, in multiples of the one to that sum; 1 for none beyond.
        loss: loss of the model in which the step ends.
        mean_loss: loss of the mean.
        examples: number of examples that have judged; 0 where no client has any, and the mean is taken.
    """

    momentum: float = 0.0
    length: float = 1.0
    loss: float = 0.0
    mean_loss: float = 0.0
    examples: float = 0.0


@dataclass(frozen=True)
class RoundReport:
    """One round of a run.

    Attributes:
        run_id: Flower's id of the run.
        round: number of the round, from 1.
        rounds: number of rounds that the run will have.
        recipe: name of the recipe in the settings.
        finished: time of the report, in UTC.
        seconds: duration of the round.
        stages: a report for each stage.
        path: loss along the path from the anchor to the clients, over the accepted clients.
        fused_path: loss along the path from the new global model to the clients' own models.
        update_cosines: None where they were not measured.
        variance: variance ratios by layer, means over clients.
        probe: None without a probe set.
        train_metrics: means of the metrics of the clients' training, weighted.
        evaluate_metrics: means of the metrics of the clients' evaluation of the new global model, weighted.
        server_metrics: metrics of the server's own evaluation of the new global model.
        model_digest: SHA-256 of the served model.
        peak_rss_bytes: peak memory of the ServerApp's process.
        last: whether this is the last round of the run.
        problem: why the run ended in this round without a new model; empty where the round succeeded.
        incidents: what the guard has seen.
        choice: which of its models the round serves and trains on; None where it has one model for both.
        step: the step beyond the mean; None where none was looked for.
        schema_version: version of the format.
    """

    run_id: str
    round: int
    rounds: int = 0
    recipe: str = ""
    finished: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    seconds: float = 0.0
    stages: tuple[StageReport, ...] = ()
    path: PathSums | None = None
    fused_path: PathSums | None = None
    update_cosines: UpdateCosines | None = None
    variance: tuple[LayerVariance, ...] = ()
    probe: ServerProbe | None = None
    train_metrics: Mapping[str, float] = field(default_factory=dict)
    evaluate_metrics: Mapping[str, float] = field(default_factory=dict)
    server_metrics: Mapping[str, float] = field(default_factory=dict)
    model_digest: bytes = b""
    peak_rss_bytes: int = 0
    last: bool = False
    problem: str = ""
    incidents: tuple[Incident, ...] = ()
    choice: Choice | None = None
    step: Step | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def metrics(self) -> dict[str, float]:
        """All metrics by name; those of training begin with `train_`, so that no other takes their place."""
        train = {
            name if name.startswith("train") else f"train_{name}": value for name, value in self.train_metrics.items()
        }
        return {**train, **self.evaluate_metrics, **self.server_metrics}

    def to_message(self) -> pb.RoundReport:
        """Return the report as the message that the Observer service carries."""
        return to_protobuf(self, pb.RoundReport())

    @classmethod
    def from_message(cls, message: pb.RoundReport) -> "RoundReport":
        """Read a report from a message.

        Raises:
            ReportError: the message is of another version, or a value in it is unknown.
        """
        if message.schema_version != SCHEMA_VERSION:
            raise ReportError(
                f"schema_version is {message.schema_version}, and this fedbasin reads {SCHEMA_VERSION}; "
                "install the same fedbasin on both sides"
            )
        try:
            return from_protobuf(cls, message)
        except ConversionError as error:
            raise ReportError(str(error)) from error

    def to_bytes(self) -> bytes:
        """Return the report in its one serialised form.

        Unlike the dataclasses, the bytes of two reports also compare equal where a metric is NaN.
        """
        return self.to_message().SerializeToString(deterministic=True)

    @classmethod
    def from_bytes(cls, data: bytes) -> "RoundReport":
        """Read a serialised report.

        Raises:
            ReportError: the bytes are not a report of this version.
        """
        message = pb.RoundReport()
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            raise ReportError(f"not a round report: {error}") from error
        return cls.from_message(message)

    @staticmethod
    def normalise(data: bytes) -> bytes:
        """Return serialised fields in their one form, without those that this version does not know.

        Raises:
            ReportError: the bytes are not fields of a report.
        """
        try:
            message = pb.RoundReport.FromString(data)
        except DecodeError as error:
            raise ReportError(f"not a round report: {error}") from error
        message.DiscardUnknownFields()
        return message.SerializeToString(deterministic=True)

    def to_json(self) -> str:
        """Return the report as one line of JSON, as `rounds.jsonl` holds it."""
        message = self.to_message()
        return json_format.MessageToJson(message, indent=None, preserving_proto_field_name=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> "RoundReport":
        """Read a line of JSON; unknown fields are ignored.

        Raises:
            ReportError: the line is not a report of this version.
        """
        message = pb.RoundReport()
        try:
            json_format.Parse(text, message, ignore_unknown_fields=True)
        except (json_format.ParseError, UnicodeDecodeError, DecodeError) as error:
            raise ReportError(f"not a round report: {error}") from error
        return cls.from_message(message)
