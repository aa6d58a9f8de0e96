"""Every metric that Prometheus can scrape of a federation: names, labels, units and what they mean.

`fedbasin.server.observe.telemetry` fills them, `docs/metrics.md` lists them. Names follow Prometheus' conventions: base units,
the unit in the name, `_total` for counters. No label holds a client or a run, whose number has no bound; a
run's id and round travel as exemplars instead.
"""

from dataclasses import dataclass

PREFIX = "fedbasin_"

# The names in fedbasin.strategies, which would bring torch; a test compares. Their counters exist from the start, at
# zero, so that a rate also sees what the first round counts.
RECIPES = (
    "fedavg",
    "fedavgm",
    "fisher",
    "kfac",
    "regmean",
    "regmean++",
    "features",
    "head",
    "auto",
    "auto-head",
    "features-head",
    "lora",
    "lora-products",
    "lora-factors",
    "lora-rotated",
    "lora-gram",
    "lorm",
)
STAGES = ("bootstrap", "fuse", "link", "fit", "head", "probe", "evaluate")
STATES = ("running", "finished", "failed")
SIDES = ("clients", "server")

# From a message on loopback to a night on phones.
_WORK_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
# The server's own arithmetic.
_COMPUTE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


@dataclass(frozen=True)
class Metric:
    """A metric's entry.

    Attributes:
        name: without the prefix.
        text: the help text; it names the unit where the name does not.
        labels: their names.
        buckets: upper bounds; only histograms have them.
    """

    name: str
    text: str
    labels: tuple[str, ...] = ("recipe",)
    buckets: tuple[float, ...] = ()


ROUNDS = Metric("rounds_total", "Rounds finished.")
RUNS_FINISHED = Metric("runs_finished_total", "Runs that came to their last round.")
RUNS_FAILED = Metric("runs_failed_total", "Runs that an error ended before their last round.")
UPDATES = Metric("updates_total", "Clients' replies by what became of them.", ("recipe", "outcome"))
RECEIVED = Metric("received_bytes_total", "Bytes of tensors received from clients.")
SENT = Metric("sent_bytes_total", "Bytes of tensors sent to clients.")
PROBE_SECONDS = Metric(
    "probe_seconds_total",
    "Seconds that probing took: the clients' paths, variances and singular vectors, all clients together; the "
    "server's comparison of updates and its own probe set.",
    ("recipe", "side"),
)
PROBE_BYTES = Metric(
    "probe_bytes_total",
    "Bytes that probing took: of the clients' answers on the wire; of the models that the server kept on disk.",
    ("recipe", "side"),
)
COUNTERS = (
    ROUNDS,
    RUNS_FINISHED,
    RUNS_FAILED,
    UPDATES,
    RECEIVED,
    SENT,
    PROBE_SECONDS,
    PROBE_BYTES,
)

ROUND_SECONDS = Metric(
    "round_duration_seconds", "From a round's start to its end.", buckets=_WORK_BUCKETS
)
STAGE_SECONDS = Metric(
    "stage_duration_seconds",
    "From the first request of a stage to its value.",
    ("recipe", "stage"),
    _WORK_BUCKETS,
)
SERVER_SECONDS = Metric(
    "server_duration_seconds",
    "Preparing, decoding, validating, folding and solving in a stage.",
    ("recipe", "stage"),
    _COMPUTE_BUCKETS,
)
CLIENT_SECONDS = Metric(
    "client_duration_seconds",
    "From a request to its accepted reply.",
    ("recipe", "stage"),
    _WORK_BUCKETS,
)
HISTOGRAMS = (ROUND_SECONDS, STAGE_SECONDS, SERVER_SECONDS, CLIENT_SECONDS)

BUILD = Metric("build_info", "1; the label says which fedbasin the observer runs.", ("version",))
STATE = Metric(
    "run_state",
    "1 for the state of the run that reported last, 0 for the others.",
    ("recipe", "state"),
)
ROUND = Metric("round", "Number of the last round finished.")
PLANNED = Metric("planned_rounds", "How many rounds the run that reported last will have.")
FINISHED = Metric("last_round_timestamp_seconds", "When the last round finished.")
LAST_SECONDS = Metric("last_round_duration_seconds", "How long the last round took.")
MEMORY = Metric("server_peak_rss_bytes", "Peak resident memory of the ServerApp.")
BARRIER_LOSS = Metric(
    "barrier_loss",
    "Rise of the mean loss, in the app's unit, above the straight line between anchor and clients, "
    "before and after alignment, when it was last probed.",
    ("recipe", "when"),
)
BARRIER_ACCURACY = Metric(
    "barrier_accuracy_ratio",
    "Fall of the accuracy below the straight line between anchor and clients, before and after alignment, "
    "when it was last probed.",
    ("recipe", "when"),
)
ENDPOINT_ERROR = Metric(
    "endpoint_error_ratio",
    "Relative difference of a client's own loss before and after alignment, which only rounding may make; maximum "
    "of the accepted clients that probed a path.",
)
FUSED_BARRIER = Metric(
    "fused_barrier_loss",
    "Rise of the mean loss, in the app's unit, above the straight line between the new global model and the "
    "clients' own, when it was last probed.",
)
FUSED_GAP = Metric(
    "fused_midpoint_gap_loss",
    "Mean loss in the middle between the new global model and the clients' own, less the mean of the losses at "
    "the ends, when it was last probed; negative where mixing helps.",
)
GAIN = Metric(
    "alignment_gain", "Rise of the matching objective, summed over spaces, mean of clients."
)
CERTIFIED = Metric(
    "certified_spaces_ratio", "Share of spaces whose identity alignment was proven optimal."
)
DISTANCE = Metric(
    "anchor_distance",
    "L2 distance from client to anchor, mean of clients, before and after alignment.",
    ("recipe", "when"),
)
SPECTRAL = Metric(
    "spectral_alignment_ratio",
    "Agreement of the singular vectors of clients and anchor, 1 for the same directions and about 0 for strangers; "
    "mean of clients, over the matrices that its budget pays for, before and after alignment.",
    ("recipe", "when"),
)
FIXED_POINTS = Metric(
    "fixed_points_ratio",
    "Share of units that alignment left in their place, mean of spaces and clients.",
)
SKEW = Metric(
    "skew_ratio",
    "How far the agreement of clients and anchor is from symmetric, 0 to 2, mean of the spaces that can turn, before "
    "and after alignment.",
    ("recipe", "when"),
)
VARIANCE = Metric(
    "variance_ratio",
    "Variance of the new global model's preactivations over that of the clients' models on the same data: lowest and "
    "mean of the layers; far below 1 the signal fades.",
    ("recipe", "layers"),
)
UPDATE_NORM = Metric("update_norm", "L2 norm of a client's update, mean of clients.")
UPDATE_COSINE = Metric(
    "update_cosine",
    "Cosine of clients' updates with what the new global model moved by (fused), with what the round before moved by "
    "(previous), and with one another (clients); means, from a sample of the entries.",
    ("recipe", "to"),
)
PROBE_BARRIER = Metric(
    "probe_barrier_loss",
    "On the server's probe set: the highest barrier between the clients whose models it kept, and from the new global "
    "model to them, by measure: linear, above the mean of the ends, gap in the middle, area.",
    ("recipe", "between", "measure"),
)
PROBE_ACCURACY_BARRIER = Metric(
    "probe_barrier_accuracy_ratio",
    "On the server's probe set: the largest fall of the accuracy below the straight line, between the clients and "
    "from the new global model to them.",
    ("recipe", "between"),
)
PROBE_ACCURACY = Metric(
    "probe_accuracy_ratio",
    "Accuracy on the server's probe set: of the new global model, of the clients' models (mean), and of their "
    "ensemble, which is the ceiling.",
    ("recipe", "model"),
)
MODEL = Metric("model_metric", "Metrics of the new global model.", ("recipe", "name"))
GAUGES = (
    BUILD,
    STATE,
    ROUND,
    PLANNED,
    FINISHED,
    LAST_SECONDS,
    MEMORY,
    BARRIER_LOSS,
    BARRIER_ACCURACY,
    ENDPOINT_ERROR,
    FUSED_BARRIER,
    FUSED_GAP,
    GAIN,
    CERTIFIED,
    DISTANCE,
    SPECTRAL,
    FIXED_POINTS,
    SKEW,
    VARIANCE,
    UPDATE_NORM,
    UPDATE_COSINE,
    PROBE_BARRIER,
    PROBE_ACCURACY_BARRIER,
    PROBE_ACCURACY,
    MODEL,
)
