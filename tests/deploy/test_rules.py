"""Rules and their page: Prometheus' own tool accepts them, tests them, and the page says what they say."""

import re
import subprocess

import pytest
import yaml

from fedbasin.deploy.metrics_page import PAGE, RULES, render_metrics_page
from fedbasin.server.observe.metrics import metric_catalogue as catalogue
from tests.needing import needed

TESTS = RULES.with_name("rules_test.yml")
rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
alerts = [rule for rule in rules if "alert" in rule]
stories = yaml.safe_load(TESTS.read_text())["tests"]


def promtool(*arguments):
    done = subprocess.run([needed("promtool"), *arguments], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_accepts_the_rules():
    assert f"{len(rules)} rules found" in promtool("check", "rules", "--lint-fatal", str(RULES))


def test_the_alerts_fire_when_they_should_and_only_then():
    assert "SUCCESS" in promtool("test", "rules", str(TESTS))


@pytest.mark.parametrize("alert", [rule["alert"] for rule in alerts])
def test_every_alert_has_a_story_in_which_it_fires_and_one_in_which_it_does_not(alert):
    checks = [check for story in stories for check in story["promql_expr_test"] if f'"{alert}"' in check["expr"]]
    assert {bool(check.get("exp_samples")) for check in checks} == {True, False}


@pytest.mark.parametrize("rule", alerts, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_is_wrong_what_to_do_and_where_to_read(rule):
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/reference/metrics.md#{rule['alert'].lower()}"
    assert f"### {rule['alert']}\n" in PAGE.read_text()


def test_the_rules_name_only_metrics_that_exist():
    entries = (*catalogue.COUNTERS, *catalogue.GAUGES, *catalogue.HISTOGRAMS)
    known = {catalogue.PREFIX + metric.name for metric in entries}
    named = {name for rule in rules for name in re.findall(r"\bfedbasin_\w+", rule["expr"])}
    assert {name.removesuffix("_bucket") for name in named} <= known


def test_the_page_is_made_of_the_catalogue_and_the_rules():
    made = render_metrics_page(RULES.read_text())
    assert PAGE.read_text() == made, "run `python -m fedbasin.deploy.metrics_page`"
