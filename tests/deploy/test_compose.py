"""The compose file against the real command lines; test_containers.py starts it."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from flwr.common.config import flatten_dict, parse_config_args

from fedbasin.deploy.processes import SCRIPTS, strip_colour
from fedbasin.server.run.settings import read_settings
from tests.needing import needed
from tests.waiting import LONG

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
PROMETHEUS = ROOT / "deploy/prometheus.yml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIGITS = tomllib.loads((ROOT / "deploy/digits/pyproject.toml").read_text())["tool"]["flwr"]["app"]
SERVICES = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "fedbasin" in service["image"]}


def interpolated(text):
    """Text as Compose reads it where no variable is set."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", str(text))


def command(service):
    return shlex.split(interpolated(SERVICES[service]["command"]))


def option(service, name):
    words = command(service)
    return words[words.index(name) + 1]


@pytest.mark.parametrize("service", OURS)
def test_every_command_is_one_that_its_program_takes(service):
    program, *arguments = command(service)
    path = [sys.executable] if program == "python" else [SCRIPTS / program]
    asked = subprocess.run(
        [*path, *arguments, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        timeout=LONG,
    )
    assert asked.returncode == 0, asked.stderr
    known = set(re.findall(r"--[a-z][a-z-]+", strip_colour(asked.stdout)))
    if service == "nodes":
        known |= {"--insecure", "--superlink"}  # of each SuperNode
    assert {word for word in arguments if word.startswith("--")} <= known


def test_images_are_pinned_and_ours_carries_the_version_of_the_project():
    images = {name: interpolated(service["image"]) for name, service in SERVICES.items()}
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in images.values())
    assert {images[name] for name in OURS} == {f"fedbasin:{PROJECT['version']}"}


def test_what_is_published_is_for_reading_and_for_this_machine_only():
    published = {name: ports for name, s in SERVICES.items() if (ports := s.get("ports"))}
    assert sorted(published) == ["alertmanager", "grafana", "observer", "prometheus"]
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    inside = {port.rpartition(":")[2] for port in published["observer"]}
    assert inside == {option("observer", "--metrics-port")}  # not the port that takes reports


def test_grafana_finds_the_dashboard_where_its_provider_looks_and_prometheus_by_name():
    mounted = dict(volume.split(":")[1::-1] for volume in SERVICES["grafana"]["volumes"])
    rooms = ROOT / "deploy" / mounted["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((rooms / "dashboards/fedbasin.yaml").read_text())["providers"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert (ROOT / "deploy" / mounted[home]).is_file()
    (source,) = yaml.safe_load((rooms / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"].split("/")[2].partition(":")[0] in SERVICES
    assert set(SERVICES["grafana"]["networks"]) & set(SERVICES["prometheus"]["networks"])


def test_the_observer_hands_out_the_models_that_runs_write_and_cannot_change_them():
    folder = option("observer", "--models")
    (mount,) = [v for v in SERVICES["observer"]["volumes"] if v.startswith("runs:")]
    (written,) = [v for v in SERVICES["superexec"]["volumes"] if v.startswith("runs:")]
    assert mount == f"{written}:ro"
    assert written.endswith(f"/{folder}")


def test_prometheus_keeps_exemplars():
    assert "--enable-feature=exemplar-storage" in command("prometheus")


def test_the_port_that_runs_code_and_the_one_that_takes_reports_are_on_networks_without_an_address_outside():
    assert SERVICES["superlink"]["networks"] == ["federation"]
    host = option("observer", "--host")
    assert [name for name, how in SERVICES["observer"]["networks"].items() if host in how["aliases"]] == ["reports"]
    for name in ("federation", "reports"):
        network = COMPOSE["networks"][name]
        assert network["internal"] is True
        assert network["driver_opts"]["com.docker.network.bridge.inhibit_ipv4"] == "true"


def test_whatever_stays_up_is_watched_limited_and_restarted():
    for name, service in SERVICES.items():
        if "profiles" not in service:
            assert service["healthcheck"]["test"], name
            assert service["restart"] == "unless-stopped", name
        assert service["deploy"]["resources"]["limits"]["memory"], name


def test_a_round_waits_for_as_many_nodes_as_are_started():
    clients = int(option("nodes", "--clients"))
    assert clients == DIGITS["config"]["fedbasin"]["min-available-nodes"]
    assert clients == read_settings(parse_config_args([option("cli", "--run-config")])).min_available_nodes
    for service in ("nodes", "cli"):
        assert "${FEDBASIN_CLIENTS:-" in SERVICES[service]["command"]


def test_everyone_finds_the_superlink_where_it_listens():
    address = f"superlink:{option('superlink', '--port')}"
    flower = tomllib.loads(COMPOSE["configs"]["flower"]["content"])
    assert flower["superlink"]["compose"]["address"] == address
    assert option("superexec", "--runtime-api-address") == address
    assert option("nodes", "--superlink") == address


def test_runs_report_to_the_observer_where_it_listens():
    given = parse_config_args([option("cli", "--run-config")])
    settings = read_settings(given)
    assert settings.observer == f"{option('observer', '--host')}:{option('observer', '--port')}"
    config = DIGITS["config"]
    assert given.keys() <= {*config, *(f"fedbasin.{key}" for key in config["fedbasin"])}


def test_the_observer_has_a_token_which_runs_and_the_command_line_find_where_it_is_made():
    given = read_settings(parse_config_args([option("cli", "--run-config")]))
    assert given.observer_token_file == option("observer", "--token-file")
    assert given.observer_insecure
    assert "--insecure" in command("observer")
    (folder,) = [v for v in SERVICES["observer"]["volumes"] if v.startswith("access:")]
    for service in ("superexec", "cli"):
        assert f"{folder}:ro" in SERVICES[service]["volumes"]
    assert folder.endswith(f"/{Path(given.observer_token_file).parent}")
    environment = SERVICES["cli"]["environment"]
    assert environment["FEDBASIN_TOKEN_FILE"] == f"{folder.partition(':')[2]}/{Path(given.observer_token_file).name}"
    assert environment["FEDBASIN_INSECURE"] == "1"


def test_prometheus_scrapes_the_observer_where_it_shows_its_metrics():
    jobs = {job["job_name"]: job for job in yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]}
    (static,) = jobs["fedbasin"]["static_configs"]
    name = option("observer", "--allowed-host")
    assert static["targets"] == [f"{name}:{option('observer', '--metrics-port')}"]
    assert name in SERVICES["observer"]["networks"]["monitoring"]["aliases"]


def test_prometheus_is_given_every_rule_file_that_it_reads():
    mounted = [volume.split(":") for volume in SERVICES["prometheus"]["volumes"]]
    folders = {inside: ROOT / "deploy" / outside for outside, inside, *_ in mounted}
    for rules in yaml.safe_load(PROMETHEUS.read_text())["rule_files"]:
        assert folders[f"/etc/prometheus/{rules}"].is_file()


def test_volumes_lie_where_the_image_made_folders_that_its_user_may_write():
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    for service in OURS.values():
        for volume in service.get("volumes", ()):
            assert interpolated(volume).split(":")[1] in dockerfile


def test_prometheus_takes_its_configuration():
    subprocess.run([needed("promtool"), "check", "config", PROMETHEUS], check=True, timeout=LONG)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.secure.yaml", "compose.simulation.yaml"])
def test_the_command_line_sets_only_keys_that_the_app_has(name):
    # Flower refuses a run with any other key. Compose's tags say how files are merged.
    text = re.sub("!override|!reset", "", (ROOT / "deploy" / name).read_text())
    words = shlex.split(interpolated(yaml.safe_load(text)["services"]["cli"]["command"]))
    config = parse_config_args([words[words.index("--run-config") + 1]])
    assert set(config) <= set(flatten_dict(DIGITS["config"]))
