"""The panels of the Grafana dashboard: each has a title, an explanation, a unit and a few Prometheus expressions."""

from dataclasses import dataclass
from typing import Any

# The variable of the dashboard that chooses recipes.
_SELECTED = 'recipe=~"$recipe"'
_SCRAPED = 'job="fedbasin"'

# What a panel without data waits for.
_NO_RATE = "Empty until the second round: a rate needs two values."
_NO_PROBE_SET = "Empty without a probe set."


@dataclass(frozen=True)
class Panel:
    """A panel of the dashboard.

    Attributes:
        title: heading.
        text: explanation.
        unit: Grafana's name of the unit.
        lines: pairs of an expression and its legend.
        kind: Grafana's panel type.
        width: number of columns, of 24.
        height: number of Grafana's rows of 30 pixels.
        options: options of this kind of panel.
        custom: drawing style of the series.
    """

    title: str
    text: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 12
    height: int = 8
    options: tuple[tuple[str, Any], ...] = ()
    custom: tuple[tuple[str, Any], ...] = ()


def stat(title: str, text: str, unit: str, *lines: tuple[str, str], show: str = "auto") -> Panel:
    """Return a panel with the last value in large letters; `show` is auto, value, name or value_and_name."""
    options = (("textMode", show), ("reduceOptions", {"calcs": ["lastNotNull"]}))
    return Panel(title, text, unit, lines, "stat", 6, 4, options)


def bars(title: str, text: str, unit: str, *lines: tuple[str, str]) -> Panel:
    """Return a panel of stacked bars."""
    custom = (("drawStyle", "bars"), ("fillOpacity", 60), ("stacking", {"mode": "normal"}))
    return Panel(title, text, unit, lines, custom=custom)


def curves(title: str, text: str, unit: str, *lines: tuple[str, str], width: int = 12) -> Panel:
    """Return a panel of curves over time."""
    return Panel(title, text, unit, lines, width=width)


def _quantiles(metric: str, *labels: str) -> tuple[tuple[str, str], ...]:
    grouping = ", ".join(("le", "recipe", *labels))
    legend = " ".join(f"{{{{{label}}}}}" for label in ("recipe", *labels))
    rates = f"sum by ({grouping}) (rate({metric}_bucket{{{_SELECTED}}}[$window]))"
    return tuple(
        # The quantile of a stage that the recipe does not have is NaN, which the comparison leaves out.
        (f"histogram_quantile({share}, {rates}) >= 0", f"{legend} {name}")
        for share, name in ((0.5, "median"), (0.95, "95 %"))
    )


def _increase(metric: str, labels: str, more: str = "") -> str:
    return f"sum by ({labels}) (increase({metric}{{{_SELECTED}{more}}}[$window]))"


def _probe_cost(unit: str) -> tuple[tuple[str, str], ...]:
    rounds = f"({_increase('fedbasin_rounds_total', 'recipe')} > 0)"
    spent = _increase(f"fedbasin_probe_{unit}_total", "recipe, side")
    # `group_left` keeps the side in the quotient; windows without a round are left out, not divided by zero.
    return ((f"{spent} / on (recipe) group_left () {rounds}", "{{recipe}} {{side}}"),)


_UPDATES = "fedbasin_updates_total"
_ACCEPTED = ', outcome="accepted"'
_ACCEPTED_SHARE = f"{_increase(_UPDATES, 'recipe', _ACCEPTED)} / ({_increase(_UPDATES, 'recipe')} > 0)"

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Overview",
        (
            stat(
                "State",
                "State of the run that reported last; lost where its process is gone and has not said that it ends.",
                "none",
                (f"fedbasin_run_state{{{_SELECTED}}} == 1", "{{recipe}}: {{state}}"),
                show="name",
            ),
            stat(
                "Round",
                "Number of the last round that finished, and number of rounds that the run will have.",
                "none",
                (f"fedbasin_round{{{_SELECTED}}}", "{{recipe}}"),
                (f"fedbasin_planned_rounds{{{_SELECTED}}}", "{{recipe}}, planned"),
            ),
            stat(
                "Since the last round",
                "Seconds since the last round ended.",
                "s",
                (f"time() - fedbasin_last_round_timestamp_seconds{{{_SELECTED}}}", "{{recipe}}"),
            ),
            stat(
                "Runs",
                "Runs since the observer started, those in its store included.",
                "none",
                (f"sum(fedbasin_runs_finished_total{{{_SELECTED}}})", "finished"),
                (f"sum(fedbasin_runs_failed_total{{{_SELECTED}}})", "failed"),
            ),
            curves(
                "Metrics of the global model",
                "Weighted means of the clients' metrics, and the metrics of the server's own evaluation.",
                "none",
                (f"fedbasin_model_metric{{{_SELECTED}}}", "{{recipe}} {{name}}"),
                width=24,
            ),
        ),
    ),
    (
        "Barriers, before and after alignment",
        (
            curves(
                "Loss barrier",
                "Rise of the loss above the straight line from anchor to clients; 0 means one basin.",
                "none",
                (f"fedbasin_barrier_loss{{{_SELECTED}}}", "{{recipe}} {{when}}"),
            ),
            curves(
                "Accuracy barrier",
                "Fall of the accuracy below the straight line from anchor to clients.",
                "percentunit",
                (f"fedbasin_barrier_accuracy_ratio{{{_SELECTED}}}", "{{recipe}} {{when}}"),
            ),
            curves(
                "From the new global model to the clients",
                "Barrier of the path, and the gap in its middle: negative if mixing helps. Empty without fused-points.",
                "none",
                (f"fedbasin_fused_barrier_loss{{{_SELECTED}}}", "{{recipe}} barrier"),
                (f"fedbasin_fused_midpoint_gap_loss{{{_SELECTED}}}", "{{recipe}} gap in the middle"),
            ),
            curves(
                "Endpoint error",
                "Largest change of a client's own loss by alignment. Only rounding may cause one; else the symmetry is wrong.",
                "none",
                (f"fedbasin_endpoint_error_ratio{{{_SELECTED}}}", "{{recipe}}"),
            ),
        ),
    ),
    (
        "On the server's probe set",
        (
            curves(
                "Barriers on the probe set",
                "Highest barrier between clients, and from the global model to them. " + _NO_PROBE_SET,
                "none",
                (f'fedbasin_probe_barrier_loss{{{_SELECTED}, measure="linear"}}', "{{recipe}} {{between}}"),
                width=8,
            ),
            curves(
                "Barriers by measure",
                "Above the chord, above the mean of the ends (Git Re-Basin), in the middle, area. " + _NO_PROBE_SET,
                "none",
                (f'fedbasin_probe_barrier_loss{{{_SELECTED}, between="clients"}}', "{{recipe}} {{measure}}"),
                width=8,
            ),
            curves(
                "Accuracy on the probe set",
                "Accuracy of the global model, of clients (mean) and of their ensemble, a bound in practice. "
                + _NO_PROBE_SET,
                "percentunit",
                (f"fedbasin_probe_accuracy_ratio{{{_SELECTED}}}", "{{recipe}} {{model}}"),
                width=8,
            ),
        ),
    ),
    (
        "Outcomes",
        (
            bars(
                "Replies by outcome",
                "Replies in each window; outcomes that never occurred are left out. " + _NO_RATE,
                "none",
                (
                    f"{_increase(_UPDATES, 'outcome')} and on (outcome) "
                    f"(sum by (outcome) ({_UPDATES}{{{_SELECTED}}}) > 0)",
                    "{{outcome}}",
                ),
            ),
            curves(
                "Share accepted",
                "Share of the replies in the window that were accepted. " + _NO_RATE,
                "percentunit",
                (_ACCEPTED_SHARE, "{{recipe}}"),
            ),
        ),
    ),
    (
        "Alignment",
        (
            curves(
                "Distance to the anchor",
                "L2 distance from client to anchor, mean of clients; alignment removes the part that only symmetry causes.",
                "none",
                (f"fedbasin_anchor_distance{{{_SELECTED}}}", "{{recipe}} {{when}}"),
                width=8,
            ),
            curves(
                "Gain",
                "Rise of the matching objective; 0 where clients share the anchor's basin already.",
                "none",
                (f"fedbasin_alignment_gain{{{_SELECTED}}}", "{{recipe}}"),
                width=8,
            ),
            curves(
                "Spaces certified",
                "Share of spaces whose identity was proven optimal, so that nothing was searched.",
                "percentunit",
                (f"fedbasin_certified_spaces_ratio{{{_SELECTED}}}", "{{recipe}}"),
                width=8,
            ),
            curves(
                "Units left in their place",
                "Share of units that stayed in place, mean of spaces and clients; about 1/n after independent initialisations.",
                "percentunit",
                (f"fedbasin_fixed_points_ratio{{{_SELECTED}}}", "{{recipe}}"),
                width=8,
            ),
            curves(
                "Singular vectors in common",
                "Agreement with the anchor, over the matrices that a small budget pays for.",
                "none",
                (f"fedbasin_spectral_alignment_ratio{{{_SELECTED}}}", "{{recipe}} {{when}}"),
                width=8,
            ),
            curves(
                "Hidden variance",
                "Of the global model over the clients'; far below 1, activations collapse. Empty without fused-points.",
                "none",
                (f"fedbasin_variance_ratio{{{_SELECTED}}}", "{{recipe}} {{layers}}"),
                width=8,
            ),
        ),
    ),
    (
        "Updates",
        (
            curves(
                "Cosine of updates",
                "Cosine with the movement of this round, with that of the round before, and between clients.",
                "none",
                (f"fedbasin_update_cosine{{{_SELECTED}}}", "{{recipe}} {{to}}"),
            ),
            curves(
                "Length of updates",
                "L2 norm of a client's update, mean of clients.",
                "none",
                (f"fedbasin_update_norm{{{_SELECTED}}}", "{{recipe}}"),
            ),
        ),
    ),
    (
        "Bytes and seconds",
        (
            curves(
                "Seconds of probing, a round",
                "Mean over the window: all clients together, and the server. " + _NO_RATE,
                "s",
                *_probe_cost("seconds"),
            ),
            curves(
                "Bytes of probing, a round",
                "Mean over the window: in the clients' replies, and of the models that the server kept on disk. "
                + _NO_RATE,
                "decbytes",
                *_probe_cost("bytes"),
            ),
            curves(
                "Bytes of a round",
                "Mean over the window, all clients. " + _NO_RATE,
                "decbytes",
                *(
                    (
                        f"{_increase(f'fedbasin_{name}_bytes_total', 'recipe')}"
                        f" / ({_increase('fedbasin_rounds_total', 'recipe')} > 0)",
                        f"{{{{recipe}}}} {name}",
                    )
                    for name in ("received", "sent")
                ),
            ),
            curves(
                "Seconds of a round",
                "Seconds from start to end, estimated from the buckets. " + _NO_RATE,
                "s",
                *_quantiles("fedbasin_round_duration_seconds"),
            ),
            curves(
                "Seconds of a stage",
                "Seconds from start to end, estimated from the buckets. " + _NO_RATE,
                "s",
                *_quantiles("fedbasin_stage_duration_seconds", "stage"),
            ),
            curves(
                "Seconds of a client",
                "Seconds from a request to its accepted reply, estimated from the buckets. " + _NO_RATE,
                "s",
                *_quantiles("fedbasin_client_duration_seconds", "stage"),
            ),
        ),
    ),
    (
        "Server",
        (
            curves(
                "Seconds of the server's own work",
                "Seconds of a stage for preparing, decoding, checking, adding and solving. " + _NO_RATE,
                "s",
                *_quantiles("fedbasin_server_duration_seconds", "stage"),
            ),
            curves(
                "Peak memory of the ServerApp",
                "Peak resident memory; it does not grow with clients where replies are added as they come.",
                "bytes",
                (f"fedbasin_server_peak_rss_bytes{{{_SELECTED}}}", "{{recipe}}"),
            ),
            curves(
                "Memory of the observer",
                "Resident memory, bounded by the limits of the history.",
                "bytes",
                (f"process_resident_memory_bytes{{{_SCRAPED}}}", "{{instance}}"),
            ),
            curves(
                "Seconds of a scrape",
                "Seconds that the observer takes to answer Prometheus.",
                "s",
                (f"scrape_duration_seconds{{{_SCRAPED}}}", "{{instance}}"),
            ),
        ),
    ),
)
