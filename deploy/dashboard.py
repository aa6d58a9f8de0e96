"""Writes the Grafana dashboard: rows of panels, each a few Prometheus expressions with a unit.

`python -m fedbasin.deploy.dashboard`, in a checkout, makes deploy/grafana/dashboard.json. The format is
Grafana's dashboard JSON of version 10.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "grafana" / "dashboard.json"

_COLUMNS = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_MINE = 'recipe=~"$recipe"'
_SCRAPED = 'job="fedbasin"'


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: what it shows.
        text: how to read it.
        unit: Grafana's word for the unit.
        lines: pairs of an expression and its legend.
        kind: Grafana's panel type.
        width: of 24 columns.
        height: in Grafana's rows of 30 pixels.
        options: of this kind of panel.
        custom: how series are drawn.
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
    """A panel with the last value in large letters; `show` is value, name, or both."""
    options = (("textMode", show), ("reduceOptions", {"calcs": ["lastNotNull"]}))
    return Panel(title, text, unit, lines, "stat", 6, 4, options)


def bars(title: str, text: str, unit: str, *lines: tuple[str, str]) -> Panel:
    """A panel of stacked bars."""
    custom = (("drawStyle", "bars"), ("fillOpacity", 60), ("stacking", {"mode": "normal"}))
    return Panel(title, text, unit, lines, custom=custom)


def curves(title: str, text: str, unit: str, *lines: tuple[str, str], width: int = 12) -> Panel:
    """A panel of curves over time."""
    return Panel(title, text, unit, lines, width=width)


def _quantiles(metric: str, *labels: str) -> tuple[tuple[str, str], ...]:
    kept = ", ".join(("le", "recipe", *labels))
    legend = " ".join(f"{{{{{label}}}}}" for label in ("recipe", *labels))
    rates = f"sum by ({kept}) (rate({metric}_bucket{{{_MINE}}}[$window]))"
    return tuple(
        # A stage that the recipe does not have has no quantile: NaN is not above zero.
        (f"histogram_quantile({share}, {rates}) >= 0", f"{legend} {name}")
        for share, name in ((0.5, "median"), (0.95, "95 %"))
    )


def _summed(metric: str, labels: str, more: str = "") -> str:
    return f"sum by ({labels}) (increase({metric}{{{_MINE}{more}}}[$window]))"


def _probing(unit: str) -> tuple[tuple[str, str], ...]:
    rounds = f"({_summed('fedbasin_rounds_total', 'recipe')} > 0)"
    spent = _summed(f"fedbasin_probe_{unit}_total", "recipe, side")
    return ((f"{spent} / on (recipe) group_left () {rounds}", "{{recipe}} {{side}}"),)


_UPDATES = "fedbasin_updates_total"
_ACCEPTED = ', outcome="accepted"'
_ACCEPTED_SHARE = f"{_summed(_UPDATES, 'recipe', _ACCEPTED)} / ({_summed(_UPDATES, 'recipe')} > 0)"

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Overview",
        (
            stat(
                "State",
                "Of the run that reported last. A run that was killed stays running; see the time beside.",
                "none",
                (f"fedbasin_run_state{{{_MINE}}} == 1", "{{recipe}}: {{state}}"),
                show="name",
            ),
            stat(
                "Round",
                "The last round finished, and how many the run will have.",
                "none",
                (f"fedbasin_round{{{_MINE}}}", "{{recipe}}"),
                (f"fedbasin_planned_rounds{{{_MINE}}}", "{{recipe}}, planned"),
            ),
            stat(
                "Since the last round",
                "Grows until the next round ends.",
                "s",
                (f"time() - fedbasin_last_round_timestamp_seconds{{{_MINE}}}", "{{recipe}}"),
            ),
            stat(
                "Runs",
                "Since the observer began, its store included.",
                "none",
                (f"sum(fedbasin_runs_finished_total{{{_MINE}}})", "finished"),
                (f"sum(fedbasin_runs_failed_total{{{_MINE}}})", "failed"),
            ),
            curves(
                "Metrics of the global model",
                "Weighted means of the clients' metrics, and the server's own.",
                "none",
                (f"fedbasin_model_metric{{{_MINE}}}", "{{recipe}} {{name}}"),
                width=24,
            ),
        ),
    ),
    (
        "Barriers, before and after alignment",
        (
            curves(
                "Loss barrier",
                "How far the loss rises above the straight line from anchor to clients; 0 is one basin.",
                "none",
                (f"fedbasin_barrier_loss{{{_MINE}}}", "{{recipe}} {{when}}"),
            ),
            curves(
                "Accuracy barrier",
                "How far the accuracy falls below the straight line from anchor to clients.",
                "percentunit",
                (f"fedbasin_barrier_accuracy_ratio{{{_MINE}}}", "{{recipe}} {{when}}"),
            ),
            curves(
                "From the new global model to the clients",
                "Barrier of the path, and the gap in its middle: negative where mixing both would help.",
                "none",
                (f"fedbasin_fused_barrier_loss{{{_MINE}}}", "{{recipe}} barrier"),
                (f"fedbasin_fused_midpoint_gap_loss{{{_MINE}}}", "{{recipe}} gap in the middle"),
            ),
            curves(
                "Endpoint error",
                "By how much alignment changed a client's own loss, at most: rounding, or no number here counts.",
                "none",
                (f"fedbasin_endpoint_error_ratio{{{_MINE}}}", "{{recipe}}"),
            ),
        ),
    ),
    (
        "On the server's probe set",
        (
            curves(
                "Barriers on the probe set",
                "The highest between the clients whose models were kept, and from the new global model to them.",
                "none",
                (
                    f'fedbasin_probe_barrier_loss{{{_MINE}, measure="linear"}}',
                    "{{recipe}} {{between}}",
                ),
                width=8,
            ),
            curves(
                "Barriers by measure",
                "Between clients: above the chord, above the mean of the ends (Git Re-Basin), in the middle, area.",
                "none",
                (
                    f'fedbasin_probe_barrier_loss{{{_MINE}, between="clients"}}',
                    "{{recipe}} {{measure}}",
                ),
                width=8,
            ),
            curves(
                "Accuracy on the probe set",
                "Of the global model, of the clients and of their ensemble, which is the ceiling.",
                "percentunit",
                (f"fedbasin_probe_accuracy_ratio{{{_MINE}}}", "{{recipe}} {{model}}"),
                width=8,
            ),
        ),
    ),
    (
        "Outcomes",
        (
            bars(
                "Replies by outcome",
                "In each window of the variable above; outcomes that never came are left out.",
                "none",
                (
                    f"{_summed(_UPDATES, 'outcome')} and on (outcome) "
                    f"(sum by (outcome) ({_UPDATES}{{{_MINE}}}) > 0)",
                    "{{outcome}}",
                ),
            ),
            curves(
                "Share accepted",
                "Of the replies in the window.",
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
                "L2, mean of clients: what alignment took away was only a matter of naming.",
                "none",
                (f"fedbasin_anchor_distance{{{_MINE}}}", "{{recipe}} {{when}}"),
                width=8,
            ),
            curves(
                "Gain",
                "Rise of the matching objective; 0 where clients share the anchor's basin already.",
                "none",
                (f"fedbasin_alignment_gain{{{_MINE}}}", "{{recipe}}"),
                width=8,
            ),
            curves(
                "Spaces certified",
                "Share of spaces whose identity was proven optimal, so that nothing was searched.",
                "percentunit",
                (f"fedbasin_certified_spaces_ratio{{{_MINE}}}", "{{recipe}}"),
                width=8,
            ),
            curves(
                "Units left in their place",
                "Share, mean of spaces and clients; 1 after a shared start, about 1/n for strangers.",
                "percentunit",
                (f"fedbasin_fixed_points_ratio{{{_MINE}}}", "{{recipe}}"),
                width=8,
            ),
            curves(
                "Singular vectors in common",
                "With the anchor, over the matrices that a small budget pays for; it says where distances do not.",
                "none",
                (f"fedbasin_spectral_alignment_ratio{{{_MINE}}}", "{{recipe}} {{when}}"),
                width=8,
            ),
            curves(
                "Hidden variance",
                "Of the new global model over the clients' on the same data; far below 1 the signal fades.",
                "none",
                (f"fedbasin_variance_ratio{{{_MINE}}}", "{{recipe}} {{layers}}"),
                width=8,
            ),
        ),
    ),
    (
        "Updates",
        (
            curves(
                "Cosine of updates",
                "With the new movement, the movement of the round before, and one another; 0 is a right angle.",
                "none",
                (f"fedbasin_update_cosine{{{_MINE}}}", "{{recipe}} {{to}}"),
            ),
            curves(
                "Length of updates",
                "L2, mean of clients.",
                "none",
                (f"fedbasin_update_norm{{{_MINE}}}", "{{recipe}}"),
            ),
        ),
    ),
    (
        "Bytes and seconds",
        (
            curves(
                "Seconds of probing, a round",
                "Mean over the window; clients all together, and the server.",
                "s",
                *_probing("seconds"),
            ),
            curves(
                "Bytes of probing, a round",
                "Of the clients' answers on the wire, and of the models that the server kept on disk.",
                "decbytes",
                *_probing("bytes"),
            ),
            curves(
                "Bytes of a round",
                "Mean over the window, all clients.",
                "decbytes",
                *(
                    (
                        f"{_summed(f'fedbasin_{name}_bytes_total', 'recipe')}"
                        f" / ({_summed('fedbasin_rounds_total', 'recipe')} > 0)",
                        f"{{{{recipe}}}} {name}",
                    )
                    for name in ("received", "sent")
                ),
            ),
            curves(
                "Seconds of a round",
                "As far as the buckets tell.",
                "s",
                *_quantiles("fedbasin_round_duration_seconds"),
            ),
            curves(
                "Seconds of a stage",
                "As far as the buckets tell.",
                "s",
                *_quantiles("fedbasin_stage_duration_seconds", "stage"),
            ),
            curves(
                "Seconds of a client",
                "From a request to its accepted reply.",
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
                "Preparing, decoding, validating, folding and solving, a stage.",
                "s",
                *_quantiles("fedbasin_server_duration_seconds", "stage"),
            ),
            curves(
                "Peak memory of the ServerApp",
                "Does not grow with clients where replies are folded as they come.",
                "bytes",
                (f"fedbasin_server_peak_rss_bytes{{{_MINE}}}", "{{recipe}}"),
            ),
            curves(
                "Memory of the observer",
                "Bounded by what its history may hold.",
                "bytes",
                (f"process_resident_memory_bytes{{{_SCRAPED}}}", "{{instance}}"),
            ),
            curves(
                "Seconds of a scrape",
                "How long the observer takes to answer Prometheus.",
                "s",
                (f"scrape_duration_seconds{{{_SCRAPED}}}", "{{instance}}"),
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's JSON."""
    return {
        "uid": "fedbasin",
        "title": "fedbasin",
        "description": "What rounds measured, from the observer's metrics; see docs/metrics.md.",
        "tags": ["fedbasin", "federated-learning"],
        "schemaVersion": 36,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": list(_panels()),
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "recipe",
            "label": "Recipe",
            "type": "query",
            "datasource": _SOURCE,
            "query": "label_values(fedbasin_run_state, recipe)",
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
        {
            "name": "window",
            "label": "Window",
            "type": "interval",
            "query": "1m,5m,15m,1h,6h,1d",
            "current": {"text": "15m", "value": "15m"},
        },
    ]


def _panels() -> Iterator[dict[str, Any]]:
    """Rows from top to bottom, each under its title."""
    ids, top = count(1), 0
    for title, panels in ROWS:
        place = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        yield {"id": next(ids), "type": "row", "title": title, "gridPos": place, "panels": []}
        top += 1
        for panel, place in _placed(panels, top):
            yield _panel(panel, next(ids), place)
            top = place["y"] + place["h"]


def _placed(panels: Iterable[Panel], top: int) -> Iterator[tuple[Panel, dict[str, int]]]:
    """Panels from left to right, on a new line where one does not fit."""
    left, height = 0, 0
    for panel in panels:
        if left + panel.width > _COLUMNS:
            left, top, height = 0, top + height, 0
        height = max(height, panel.height)
        yield panel, {"x": left, "y": top, "w": panel.width, "h": panel.height}
        left += panel.width


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": dict(panel.custom)},
            "overrides": [],
        },
        "options": dict(panel.options),
        "targets": [_target(panel, *line) for line in zip("ABCDEF", panel.lines, strict=False)],
    }


def _target(panel: Panel, letter: str, line: tuple[str, str]) -> dict[str, Any]:
    expression, legend = line
    target = {
        "refId": letter,
        "datasource": _SOURCE,
        "expr": expression,
        "legendFormat": legend,
        "editorMode": "code",
    }
    if panel.kind == "timeseries":
        return target | {"range": True, "exemplar": "_bucket" in expression}
    return target | {"instant": True}


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=2) + "\n")
