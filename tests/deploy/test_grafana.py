"""The dashboard: what Grafana needs of its JSON, and data behind every panel after a real run."""

import json
import math
from itertools import combinations

import pytest
import yaml

from fedbasin.deploy import dashboard
from fedbasin.proto.observer_service import RemoteObserver, RunSummary
from fedbasin.server.observe.push import connect
from tests.federation import Federation
from tests.needing import needed
from tests.observing import observer, prometheus
from tests.running import run
from tests.waiting import LONG

GRAFANA = dashboard.FILE.parent
DIGITS = GRAFANA.parent / "digits"
made = json.loads(dashboard.FILE.read_text())
panels = [panel for panel in made["panels"] if panel["type"] != "row"]
targets = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in panels
    for target in panel["targets"]
]


def test_the_committed_dashboard_is_what_the_code_makes():
    assert made == dashboard.build_dashboard(), "run `python -m fedbasin.deploy.dashboard`"


def test_grafana_can_read_every_field():
    sdk = pytest.importorskip(
        "grafana_foundation_sdk", reason="needs Grafana's schema (pip install grafana-foundation-sdk)"
    )
    del sdk
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    # The typed model drops what the schema does not know and says it back.
    understood = json.loads(json.dumps(Dashboard.from_json(made), cls=JSONEncoder))
    assert list(lost(made, understood)) == []


def lost(given, understood, path="$"):
    """The places where a value is not the one that was given."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for key, value in given.items():
            yield from lost(value, understood.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        for index, pair in enumerate(zip(given, understood, strict=True)):
            yield from lost(*pair, f"{path}[{index}]")
    elif given != understood:
        yield path


def test_panels_have_ids_of_their_own():
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)


def test_panels_lie_side_by_side_within_the_grid():
    places = [panel["gridPos"] for panel in made["panels"]]
    for place in places:
        assert place["x"] + place["w"] <= 24
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


@pytest.mark.parametrize("panel", panels, ids=lambda panel: panel["title"])
def test_every_panel_has_a_unit_a_text_and_legends(panel):
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["description"].endswith(".")
    assert panel["targets"]
    assert all(target["legendFormat"] for target in panel["targets"])
    letters = [target["refId"] for target in panel["targets"]]
    assert len(set(letters)) == len(letters)


def test_the_provisioned_files_name_what_the_dashboard_needs():
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    (variable,) = [v for v in made["templating"]["list"] if v["type"] == "datasource"]
    assert source["type"] == variable["query"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/fedbasin.yaml").read_text())["providers"]
    assert provider["type"] == "file"


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of a real run of the digits example in this process, three clients, one of which sends nonsense."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DIGITS))
        from digits.client_app import app
        from digits.task import PIXELS, load_split, make_model

    import torch

    from fedbasin.server.run.probe_set import ProbeSet

    config = {
        "width": 32,
        "epochs": 2,
        "batch-size": 64,
        "alpha": 0.0,
        "seed": 0,
        "fedbasin.recipe": "regmean",
        "fedbasin.start": "own",
        "fedbasin.min-available-nodes": 3,
        "fedbasin.barrier-points": 3,
        "fedbasin.fused-points": 3,
        "fedbasin.poll-seconds": 0.01,
        "fedbasin.grace-seconds": 0.0,
        "fedbasin.folder": str(tmp_path_factory.mktemp("runs")),
    }
    federation = Federation(app, config, 3, {102: lambda reply: None})
    probe_set = ProbeSet(make_model(32, seed=0), [load_split()[1]])
    model, example = make_model(32, seed=0), torch.zeros(2, PIXELS)
    return run(federation, model, 3, example=example, probe_set=probe_set).reports


@pytest.fixture(scope="module")
def scraper(request, tmp_path_factory):
    """A Prometheus that watched an observer while the run reported to it, a scrape or two a round."""
    needed("prometheus")  # before the run is computed that it is to watch
    reports = request.getfixturevalue("reports")
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        observer() as addresses,
        prometheus(addresses.metrics.split("/")[2], folder) as source,
        connect(addresses.observer) as channel,
    ):
        reporter = RemoteObserver(channel)
        attendance = reporter.attend(RunSummary(reports[0].run_id, "regmean", rounds=len(reports)))
        source.wait_for('fedbasin_rounds_total{recipe="regmean"} == 0')
        for number, report in enumerate(reports, start=1):
            reporter.push_round(report, timeout=LONG)
            source.wait_for(f'fedbasin_rounds_total{{recipe="regmean"}} == {number}')
        yield source
        attendance.cancel()


@pytest.mark.parametrize("expression", targets)
def test_every_expression_has_data_after_a_run(scraper, expression):
    query = expression.replace("$recipe", "regmean").replace("$window", "5m")
    values = scraper.values(query)
    assert values
    assert all(math.isfinite(value) for value in values)


def test_the_recipes_to_choose_from_are_those_that_ran(scraper):
    (variable,) = [v for v in made["templating"]["list"] if v["name"] == "recipe"]
    assert variable["query"] == "label_values(fedbasin_run_state, recipe)"
    assert scraper.get("label/recipe/values", **{"match[]": "fedbasin_run_state"}) == ["regmean"]


def test_prometheus_evaluates_every_rule_without_an_error(scraper):
    scraper.wait_for("fedbasin:round_duration_seconds:expected")
    rules = [rule for group in scraper.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == 11
    assert {rule["health"] for rule in rules} == {"ok"}


def test_prometheus_keeps_the_run_of_a_bucket_as_its_exemplar(scraper, reports):
    query = {"query": "fedbasin_round_duration_seconds_bucket", "start": 0, "end": 9e9}
    series = scraper.get("query_exemplars", **query)
    labels = [one["labels"] for bucket in series for one in bucket["exemplars"]]
    assert {"run": reports[0].run_id, "round": "3"} in labels
