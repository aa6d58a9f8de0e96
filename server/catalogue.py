"""Every metric that Prometheus can scrape of a federation: names, labels, units and what they mean.

`fedbasin.server.telemetry` fills them, `docs/metrics.md` lists them. Names follow Prometheus' conventions: base units,
the unit in the name, `_total` for counters. No label holds a client or a run, whose number has no bound; a
run's id and round travel as exemplars instead.
"""

from dataclasses import dataclass

PREFIX = "fedbasin_"

# The names in fedbasin.strategies, which would bring torch; a test compares. Their counters and histograms exist
# from the start, at zero, so that a rate also sees what the first round counts.
RECIPES = ("fedavg", "fisher", "regmean")
STAGES = ("bootstrap", "fuse", "evaluate")
STATES = ("running", "finished", "failed")

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
COUNTERS = (ROUNDS, RUNS_FINISHED, RUNS_FAILED, UPDATES, RECEIVED, SENT)

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
    "alignment_gain", "Rise of the matching objective, summed over sites, mean of clients."
)
CERTIFIED = Metric(
    "certified_sites_ratio", "Share of sites whose identity alignment was proven optimal."
)
DISTANCE = Metric(
    "anchor_distance",
    "L2 distance from client to anchor, mean of clients, before and after alignment.",
    ("recipe", "when"),
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
    MODEL,
)
