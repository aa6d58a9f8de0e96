"""The generator of docs/reference/metrics.md, from the catalogue of metrics, the alert rules and the outcomes.

In a checkout, `python -m fedbasin.deploy.metrics_page` writes the page.
"""

import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from fedbasin.server.observe.metrics import metric_catalogue as catalogue
from fedbasin.server.observe.metrics.metric_catalogue import Metric
from fedbasin.strategies.judging.outcomes import Outcome

_ROOM = Path(__file__).resolve().parent
RULES = _ROOM / "prometheus" / "rules.yml"
PAGE = _ROOM.parent / "docs" / "reference" / "metrics.md"

_INTRODUCTION = """\
# Metrics and alerts

Made by `python -m fedbasin.deploy.metrics_page`; do not edit.

`fedbasin observe` shows these on its metrics port, for Prometheus to scrape. All are computed from the reports of
rounds. Of each recipe, counters appear, at zero, when its first run begins, histograms with its first report, and
gauges when its first round has ended. A gauge keeps its value until a round of that recipe measures it again. With
a store, counters survive a restart.

- **Labels are bounded.** No label holds a client or a run. Beyond 32 recipes, 32 stages and 64 names of model metrics,
  the rest is counted as `other`.
- **Exemplars** name the run and the round that moved a counter or a bucket last. They travel only in the OpenMetrics
  format, which Prometheus requests by itself; it keeps them with `--enable-feature=exemplar-storage`.
- **Histograms are classic ones.** The Python client of Prometheus (0.26) can read native ones, but not write them.
- Runs of the same recipe at the same time share their gauges, which show the run that reported last.
- `process_*` are the memory, processor time and open files of the observer, as in every Prometheus client.

`deploy/prometheus/rules.yml` has the rules and `deploy/grafana/dashboard.json` a dashboard.
"""


def render_metrics_page(rules: str) -> str:
    """Return the page in Markdown.

    Args:
        rules: text of the file of rules.
    """
    parts = [
        _INTRODUCTION,
        "## Counters\n",
        *_table(catalogue.COUNTERS),
        "\n## Gauges\n",
        *_table(catalogue.GAUGES),
        "\n## Histograms\n",
        *_table(catalogue.HISTOGRAMS),
        "",
        *(_buckets(metric) for metric in catalogue.HISTOGRAMS),
        "\n## Recording rules\n",
        *_list_recordings(rules),
        "## Alerts\n",
        *_list_alerts(rules),
        "## Outcomes\n",
        "The values of the label `outcome`, with the cause or the remedy of each.\n",
        "| outcome | meaning |\n|---|---|",
        *(f"| `{outcome.name}` | {outcome.value} |" for outcome in Outcome),
    ]
    return "\n".join(parts) + "\n"


def _table(metrics: Iterable[Metric]) -> Iterator[str]:
    yield "| metric | labels | meaning |\n|---|---|---|"
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{catalogue.PREFIX}{metric.name}` | {labels} | {metric.text} |"


def _buckets(metric: Metric) -> str:
    bounds = ", ".join(f"{bound:g}" for bound in metric.buckets)
    line = f"- Buckets of `{catalogue.PREFIX}{metric.name}`, in seconds: {bounds}."
    return _wrap(line, subsequent_indent="  ")


def _list_recordings(rules: str) -> Iterator[str]:
    for rule in _select_rules(rules, "record"):
        yield f"`{rule['record']}`\n\n```promql\n{rule['expr']}\n```\n"


def _wrap(text: str, subsequent_indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=subsequent_indent, break_long_words=False, break_on_hyphens=False)


def _list_alerts(rules: str) -> Iterator[str]:
    for rule in _select_rules(rules, "alert"):
        pause = f" for {rule['for']}" if "for" in rule else ""
        yield f"### {rule['alert']}\n"
        severity, description = rule["labels"]["severity"], rule["annotations"]["description"]
        yield f"{_wrap(f'Severity {severity}. {description}')}\n"
        yield f"The alert fires while this holds{pause}:\n\n```promql\n{rule['expr']}\n```\n"


def _select_rules(rules: str, kind: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load(rules)["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


if __name__ == "__main__":
    PAGE.write_text(render_metrics_page(RULES.read_text()))
