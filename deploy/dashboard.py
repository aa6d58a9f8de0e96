"""The generator of the Grafana dashboard: rows of panels, each a few Prometheus expressions with a unit.

In a checkout, `python -m fedbasin.deploy.dashboard` writes deploy/grafana/dashboard.json. The format is Grafana's
dashboard JSON of version 10.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from fedbasin.deploy.panels import ROWS, Panel

FILE = Path(__file__).resolve().parent / "grafana" / "dashboard.json"

_COLUMNS = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def build_dashboard() -> dict[str, Any]:
    """Return the dashboard in Grafana's JSON."""
    return {
        "uid": "fedbasin",
        "title": "fedbasin",
        "description": "What rounds measured, from the observer's metrics; see docs/reference/metrics.md.",
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
    """Yield the rows from top to bottom, each under its title."""
    ids, top = count(1), 0
    for title, panels in ROWS:
        place = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        yield {"id": next(ids), "type": "row", "title": title, "gridPos": place, "panels": []}
        top += 1
        for panel, place in _place_panels(panels, top):
            yield _panel(panel, next(ids), place)
            top = place["y"] + place["h"]


def _place_panels(panels: Iterable[Panel], top: int) -> Iterator[tuple[Panel, dict[str, int]]]:
    """Yield panels with their places, from left to right, on a new line where a panel does not fit."""
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
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": dict(panel.custom)}, "overrides": []},
        "options": dict(panel.options),
        "targets": [_target(panel, *line) for line in zip("ABCDEF", panel.lines, strict=False)],
    }


def _target(panel: Panel, letter: str, line: tuple[str, str]) -> dict[str, Any]:
    expression, legend = line
    target = {"refId": letter, "datasource": _SOURCE, "expr": expression, "legendFormat": legend, "editorMode": "code"}
    # Only buckets carry exemplars that lead to a run; other panels need one value, not a range.
    if panel.kind == "timeseries":
        return target | {"range": True, "exemplar": "_bucket" in expression}
    return target | {"instant": True}


if __name__ == "__main__":
    FILE.write_text(json.dumps(build_dashboard(), indent=2) + "\n")
