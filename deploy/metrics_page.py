"""Writes docs/metrics.md from the catalogue of metrics, the alerting rules and the list of outcomes.

`python -m fedbasin.deploy.metrics_page`, in a checkout.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from fedbasin.server.observe import metric_catalogue as catalogue
from fedbasin.server.observe.metric_catalogue import Metric
from fedbasin.strategies.round.outcomes import Outcome

_ROOM = Path(__file__).resolve().parent
RULES = _ROOM / "prometheus" / "rules.yml"
PAGE = _ROOM.parent / "docs" / "metrics.md"

_INTRODUCTION = """\
# Metrics and alerts

Made by `python -m fedbasin.deploy.metrics_page`; do not edit.

`fedbasin observe` shows these on its metrics port, for Prometheus to scrape. All are computed from the reports of
rounds, so gauges appear when a recipe's first round has ended; counters are there before, at zero, and
histograms with the first report of a recipe.
A gauge keeps its value until a round of the same recipe measures it again. With a store, counters survive a restart.

- **Labels are bounded.** No label holds a client or a run. Beyond 32 recipes, 32 stages and 64 names of model metrics the rest
  is counted as `other`.
- **Exemplars** name the run and the round that moved a counter or a bucket last. They travel in the OpenMetrics format
  only, for which Prometheus asks by itself; it keeps them with `--enable-feature=exemplar-storage`.
- **Histograms are classic ones.** The Python client of Prometheus (0.26) can read native histograms, but not make them.
- Runs of the same recipe that go on at the same time share their gauges: the one that reported last is seen.
- `process_*` are the observer's own memory, processor time and open files, as Prometheus' clients name them everywhere.

`deploy/prometheus/rules.yml` has the rules and `deploy/grafana/dashboard.json` a dashboard.
"""


def page(rules: str) -> str:
    """The page, in Markdown.

    Args:
        rules: the text of the rules' file.
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
        "\n## Recorded\n",
        *_recorded(rules),
        "## Alerts\n",
        *_alerts(rules),
        "## Outcomes\n",
        "The values of the label `outcome`, and what to do about each.\n",
        "| outcome | what it means |\n|---|---|",
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
    return f"- Buckets of `{catalogue.PREFIX}{metric.name}`, in seconds: {bounds}."


def _recorded(rules: str) -> Iterator[str]:
    for rule in _rules(rules, "record"):
        yield f"`{rule['record']}`\n\n```promql\n{rule['expr']}\n```\n"


def _alerts(rules: str) -> Iterator[str]:
    for rule in _rules(rules, "alert"):
        pause = f" for {rule['for']}" if "for" in rule else ""
        yield f"### {rule['alert']}\n"
        yield f"Severity {rule['labels']['severity']}. {rule['annotations']['description']}\n"
        yield f"Fires while this holds{pause}:\n\n```promql\n{rule['expr']}\n```\n"


def _rules(rules: str, kind: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load(rules)["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


if __name__ == "__main__":
    PAGE.write_text(page(RULES.read_text()))
