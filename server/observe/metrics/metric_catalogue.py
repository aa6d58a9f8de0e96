"""Every metric that Prometheus can scrape of a federation: names, labels, units and meanings.

`fedbasin.server.observe.metrics.telemetry` fills them, `docs/reference/metrics.md` lists them. Names follow Prometheus'
conventions: base units, the unit in the name, `_total` for counters. No label holds a client or a run, whose number has
no bound; the id of a run and the number of a round travel as exemplars instead.
"""

from dataclasses import dataclass

PREFIX = "fedbasin_"

# Repeated here because importing them from fedbasin.strategies would bring torch; a test compares the two lists.
RECIPES = (
    "auto",
    "auto-features",
    "fedavg",
    "fedavgm",
    "fisher",
    "kfac",
    "regmean",
    "regmean++",
    "features",
    "head",
    "features-head",
    "deep-analytic",
    "lora",
    "lora-products",
    "lora-factors",
    "lora-rotated",
    "ffa-lora",
    "rolora",
    "lora-gram",
    "lorm",
)
STAGES = (
    "bootstrap",
    "fuse",
    "link",
    "measure",
    "beyond",
    "fit",
    "block",
    "head",
    "probe",
    "trial",
    "scale",
    "steps",
    "evaluate",
)
STATES = ("starting", "running", "finished", "failed", "lost")
SIDES = ("clients", "server")

# Seconds of clients and rounds: from a message on loopback to a night on phones.
_WORK_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
# Seconds of the server's own arithmetic.
_COMPUTE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


@dataclass(frozen=True)
class Metric:
    """An entry of the catalogue.

    Attributes:
        name: name without the prefix.
        text: help text; it names the unit where the name does not.
        labels: names of the labels.
        buckets: upper bounds of a histogram's buckets; empty for other kinds.
    """

    name: str
    text: str
    labels: tuple[str, ...] = ("recipe",)
    buckets: tuple[float, ...] = ()


ROUNDS = Metric("rounds_total", "Rounds that finished.")
RUNS_FINISHED = Metric("runs_finished_total", "Runs that reached their last round.")
RUNS_FAILED = Metric("runs_failed_total", "Runs that an error ended before their last round.")
UPDATES = Metric("updates_total", "Replies of clients by outcome.", ("recipe", "outcome"))
RECEIVED = Metric("received_bytes_total", "Bytes of tensors received from clients.")
SENT = Metric("sent_bytes_total", "Bytes of tensors sent to clients.")
PROBE_SECONDS = Metric(
    "probe_seconds_total",
    "Seconds of diagnostics: the clients' paths, variances and singular vectors, all clients together; the server's "
    "comparison of updates and its own probe set.",
    ("recipe", "side"),
)
PROBE_BYTES = Metric(
    "probe_bytes_total",
    "Bytes of diagnostics: in the clients' replies; of the models that the server kept on disk.",
    ("recipe", "side"),
)
INCIDENTS = Metric("incidents_total", "What the guard of the rounds has seen, by kind.", ("recipe", "kind"))
COUNTERS = (ROUNDS, RUNS_FINISHED, RUNS_FAILED, UPDATES, RECEIVED, SENT, PROBE_SECONDS, PROBE_BYTES, INCIDENTS)

ROUND_SECONDS = Metric("round_duration_seconds", "Seconds from the start of a round to its end.", buckets=_WORK_BUCKETS)
STAGE_SECONDS = Metric(
    "stage_duration_seconds",
    "Seconds from the first request of a stage to the end of the stage.",
    ("recipe", "stage"),
    _WORK_BUCKETS,
)
SERVER_SECONDS = Metric(
    "server_duration_seconds",
    "Seconds that the server spent in a stage on preparing, decoding, checking, adding and solving.",
    ("recipe", "stage"),
    _COMPUTE_BUCKETS,
)
CLIENT_SECONDS = Metric(
    "client_duration_seconds", "Seconds from a request to its accepted reply.", ("recipe", "stage"), _WORK_BUCKETS
)
HISTOGRAMS = (ROUND_SECONDS, STAGE_SECONDS, SERVER_SECONDS, CLIENT_SECONDS)

BUILD = Metric("build_info", "1; the label is the version of fedbasin that the observer runs.", ("version",))
STATE = Metric(
    "run_state",
    "1 for the state of the run that began, reported or was lost last, 0 for the others. A run is lost where its "
    "process is gone although it has not ended.",
    ("recipe", "state"),
)
ROUND = Metric("round", "Number of the last round that finished.")
PLANNED = Metric("planned_rounds", "Number of rounds that the run that reported last will have.")
FINISHED = Metric("last_round_timestamp_seconds", "Time at which the last round finished.")
LAST_SECONDS = Metric("last_round_duration_seconds", "Seconds that the last round took.")
MEMORY = Metric("server_peak_rss_bytes", "Peak resident memory of the ServerApp, in bytes.")
BARRIER_LOSS = Metric(
    "barrier_loss",
    "Rise of the mean loss, in the app's unit, above the straight line between anchor and clients, before and after "
    "alignment, when it was last measured.",
    ("recipe", "when"),
)
BARRIER_ACCURACY = Metric(
    "barrier_accuracy_ratio",
    "Fall of the accuracy below the straight line between anchor and clients, before and after alignment, when it was "
    "last measured.",
    ("recipe", "when"),
)
ENDPOINT_ERROR = Metric(
    "endpoint_error_ratio",
    "Relative difference of a client's own loss before and after alignment, which only rounding may cause; maximum "
    "of the accepted clients that evaluated a path.",
)
FUSED_BARRIER = Metric(
    "fused_barrier_loss",
    "Rise of the mean loss, in the app's unit, above the straight line between the new global model and the "
    "clients' models, when it was last measured.",
)
FUSED_GAP = Metric(
    "fused_midpoint_gap_loss",
    "Mean loss in the middle between the new global model and the clients' models, less the mean of the losses at "
    "the ends, when it was last measured; negative where mixing helps.",
)
GAIN = Metric("alignment_gain", "Rise of the matching objective, summed over spaces, mean of clients.")
CERTIFIED = Metric("certified_spaces_ratio", "Share of spaces whose identity alignment was proven optimal.")
DISTANCE = Metric(
    "anchor_distance",
    "L2 distance from client to anchor, mean of clients, before and after alignment.",
    ("recipe", "when"),
)
SPECTRAL = Metric(
    "spectral_alignment_ratio",
    "Agreement of the singular vectors of clients and anchor, 1 for the same directions and about 0 for independent "
    "models; mean of clients, over the matrices that the budget pays for, before and after alignment.",
    ("recipe", "when"),
)
FIXED_POINTS = Metric(
    "fixed_points_ratio", "Share of units that alignment left in their place, mean of spaces and clients."
)
SKEW = Metric(
    "skew_ratio",
    "Skew ratio of the agreement of clients and anchor, 0 (symmetric) to 2, mean of the spaces that can rotate, "
    "before and after alignment.",
    ("recipe", "when"),
)
VARIANCE = Metric(
    "variance_ratio",
    "Variance of the new global model's preactivations over that of the clients' models on the same data: lowest and "
    "mean of the layers; far below 1, activations collapse.",
    ("recipe", "layers"),
)
UPDATE_NORM = Metric("update_norm", "L2 norm of a client's update, mean of clients.")
UPDATE_COSINE = Metric(
    "update_cosine",
    "Cosine of clients' updates with the movement of the global model in this round (fused), with its movement in the "
    "round before (previous), and with one another (clients); means, from a sample of the entries.",
    ("recipe", "to"),
)
PROBE_BARRIER = Metric(
    "probe_barrier_loss",
    "Loss barrier on the server's probe set: the highest between the clients whose models it kept, and from the new "
    "global model to them, by measure: linear, above the mean of the ends, gap in the middle, area.",
    ("recipe", "between", "measure"),
)
PROBE_ACCURACY_BARRIER = Metric(
    "probe_barrier_accuracy_ratio",
    "Accuracy barrier on the server's probe set: the largest fall below the straight line, between the clients and "
    "from the new global model to them.",
    ("recipe", "between"),
)
PROBE_ACCURACY = Metric(
    "probe_accuracy_ratio",
    "Accuracy on the server's probe set: of the new global model, of the clients' models (mean), and of their "
    "ensemble, an upper bound in practice.",
    ("recipe", "model"),
)
MODEL = Metric(
    "model_metric",
    "Metrics of the new global model; those of the clients' training begin with `train_`.",
    ("recipe", "name"),
)
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
