"""Federations in containers on a real Docker engine: `make e2e`."""

import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load

from fedbasin.deploy.processes import strip_colour
from tests.deploy.containers import MOST_SECONDS, OBSERVER, ROOT, SERVICES, composed, docker, number_of
from tests.deploy.test_grafana import panels
from tests.quickstart_app import write_app
from tests.waiting import LONG, wait_until

pytestmark = [
    pytest.mark.deployed,
    pytest.mark.skipif(os.environ.get("FEDBASIN_E2E") != "1", reason="needs Docker (make e2e)"),
]

# From a shared start, because which client's model would be the anchor depends on the nodes' ids.
SHORT = {"epochs": 2, "num-server-rounds": 3, "fedbasin.start": '"shared"'}


@pytest.fixture(scope="module")
def stack():
    with composed() as stack:
        yield stack


@pytest.fixture(scope="module")
def log(stack):
    """Of the README's example."""
    return strip_colour(stack.run())


@pytest.fixture(scope="module")
def undisturbed(stack):
    """The model of a run in which nothing happens."""
    return load(stack.model(number_of(stack.run(**SHORT))))


def test_every_service_is_healthy(stack):
    health = stack.compose("ps", "--format", "{{.Service}} {{.Health}}").splitlines()
    assert sorted(health) == sorted(
        f"{name} healthy" for name, service in SERVICES.items() if "profiles" not in service
    )


def test_the_readmes_example_ends_with_what_it_has_reached_and_its_files_can_be_had(stack, log):
    assert "accuracy" in log
    assert "Barrier" in log
    assert "Refused replies: 0 of " in log
    run = number_of(log)
    page = stack.compose("run", "--rm", "-T", "cli", "fedbasin", "report", f"runs/{run}", "-o", "-")
    assert page.startswith("<!doctype")
    assert load(stack.model(run))
    assert "1/1" in stack.compose("run", "--rm", "-T", "cli", "fedbasin", "rounds", OBSERVER)


def test_a_run_reaches_prometheus(stack, log):
    for query in ("rounds_total{recipe='regmean'} >= 1", "runs_finished_total{recipe='regmean'} >= 1"):
        wait_until(lambda query=query: stack.asked(f"fedbasin_{query}"), log)


def test_every_panel_has_data_after_the_readmes_example_or_says_what_it_waits_for(stack, log):
    expressions = {target["expr"]: panel for panel in panels for target in panel["targets"]}
    queries = {e.replace("$recipe", "regmean").replace("$window", "5m"): panel for e, panel in expressions.items()}

    def silent():
        return {
            query
            for query, panel in queries.items()
            if not stack.asked(query) and not panel["description"].count("Empty ")
        }

    end = time.monotonic() + 120  # several scrapes and evaluations of the rules
    while silent() and time.monotonic() < end:
        time.sleep(5)
    assert silent() == set(), log
    with_data = sum(bool(stack.asked(query)) for query in queries)
    print(f"\n{with_data} of {len(queries)} expressions have data after one round", file=sys.stderr)


def test_every_rate_has_data_after_two_rounds(stack):
    stack.run(**SHORT)
    rates = {
        target["expr"].replace("$recipe", "regmean").replace("$window", "5m")
        for panel in panels
        if "until the second round" in panel["description"]
        for target in panel["targets"]
    }
    assert rates
    for query in rates:
        wait_until(lambda query=query: stack.asked(query), query)


def test_a_run_that_fails_ends_with_status_1_and_the_reason(stack):
    status, log = stack.run_until("started run", lambda: None, **{"fedbasin.recipe": '"no-such-recipe"'})
    assert status == 1
    assert "no-such-recipe" in log


@pytest.mark.parametrize("service", ["observer", "superlink", "superexec", "nodes"])
def test_a_run_outlives_the_death_of_each_service(stack, undisturbed, service):
    status, log = stack.run_until("[ROUND 2", lambda: stack.die(service), **SHORT)
    if status:
        # The process of the run itself is gone; the same command goes on where it stopped.
        log = stack.run(**SHORT)
    # Nodes that come back have other ids, and so their sum another order, whose rounding later training enlarges.
    tolerance = 1e-3 if service == "nodes" else 0.0
    torch.testing.assert_close(load(stack.model(number_of(log))), undisturbed, rtol=0, atol=tolerance)


def test_only_what_is_published_answers_an_unprivileged_user_of_the_machine(stack):
    places = {"superlink": [8000], "observer": [9470, 9471]}
    assert reached(stack, places) == {("monitoring", 9471)}  # its network is not internal, and it is published


def test_the_secured_variant_runs_and_only_what_is_published_answers(tmp_path):
    secrets = tmp_path / "secrets"
    make = [sys.executable, "-m", "fedbasin.deploy.authority", str(secrets), "--clients", "5", "--host", "localhost"]
    subprocess.run(make, check=True, timeout=LONG)
    with composed(COMPOSE_FILE="compose.yaml:compose.secure.yaml", FEDBASIN_SECRETS=secrets) as stack:
        assert load(stack.model(number_of(stack.run(**SHORT))))
        ports = {"superlink": [8000], "proxy": [8443], "observer": [9470, 9471]}
        assert reached(stack, ports) == {("monitoring", 9471), ("outside", 8443)}


@pytest.mark.parametrize("clients", [20, 50])
def test_more_clients_finish_a_run_in_a_bounded_memory(clients):
    with composed(FEDBASIN_CLIENTS=clients) as stack:
        log = strip_colour(stack.run(**SHORT))
        memory = stack.memory("nodes")
    assert f"fuse: {clients} of {clients} clients accepted" in log
    print(f"\n{clients} clients: rounds of {seconds_of_rounds(log)}; {memory / 1e9:.1f} GB at most", file=sys.stderr)
    assert memory < 10e9


def test_a_hundred_clients_are_simulated():
    with composed(COMPOSE_FILE="compose.yaml:compose.simulation.yaml", FEDBASIN_CLIENTS=100) as stack:
        log = strip_colour(stack.run(**SHORT))
        memory = stack.memory("superexec")
    assert "fuse: 100 of 100 clients accepted" in log
    print(
        f"\n100 simulated clients: rounds of {seconds_of_rounds(log)}; {memory / 1e9:.1f} GB at most", file=sys.stderr
    )
    assert memory < 8e9


def test_an_app_has_its_own_libraries_and_its_data(tmp_path):
    """As the README says it, with the quickstart's app as the own one."""
    app = write_app(tmp_path / "app")
    with (app / "quickstart/task.py").open("a") as task:
        task.write(OWN_DATA)
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    np.save(data / "patterns.npy", np.random.default_rng(0).normal(size=(10, 3 * 32 * 32)).astype("f4"))
    for folder in (tmp_path, *tmp_path.parents[:2]):  # pytest's folders are closed to the containers' user
        folder.chmod(0o755)
    with composed() as base, own_image(tmp_path / "image") as image:
        del base  # which has built the image that ours stands on
        own = {"FEDBASIN_APP_IMAGE": image, "FEDBASIN_DATA": data, "FEDBASIN_IMPORTS": "fedbasin.client,einops"}
        with composed(FEDBASIN_CLIENTS=2, **own) as stack:
            run = ["run", "--rm", "-T", "--volume", f"{app}:/app/own:ro", "cli", "fedbasin", "run", "own", "compose"]
            log = strip_colour(stack.compose(*run))
            stack.compose("cp", "superexec:/var/lib/fedbasin/final_model.pt", str(tmp_path))
    assert "fuse: 2 of 2 clients accepted" in log
    assert torch.load(tmp_path / "final_model.pt", weights_only=True)


OWN_DATA = """

import einops
import numpy as np

PATTERNS = einops.rearrange(
    torch.from_numpy(np.load("/data/patterns.npy")), "label (channel y x) -> label channel y x", channel=3, y=32
)
"""


@contextmanager
def own_image(folder):
    """The image of the README's three lines; the package index is that of the other builds."""
    first, *lines = re.search(r"```dockerfile\n(.*?)```", (ROOT / "deploy/README.md").read_text(), re.DOTALL)[
        1
    ].splitlines()
    secrets = {"pip": ("FEDBASIN_PIP_CONF", "/etc/pip.conf"), "ca": ("FEDBASIN_CA", "/run/secrets/ca")}
    mounts = " ".join(f"--mount=type=secret,id={name},target={place},mode=0444" for name, (_, place) in secrets.items())
    folder.mkdir()
    text = "\n".join([first, *(line.replace("RUN ", f"RUN {mounts} ") for line in lines)])
    (folder / "Dockerfile").write_text(text)
    tag = f"fedbasin-e2e-own:{os.getpid()}"
    files = [f"--secret=id={name},src={os.environ.get(key, '/dev/null')}" for name, (key, _) in secrets.items()]
    build = ["docker", "build", "--tag", tag, *files, folder]
    subprocess.run(build, env={**os.environ, "DOCKER_BUILDKIT": "1"}, check=True, timeout=MOST_SECONDS)
    try:
        yield tag
    finally:
        docker("image", "rm", tag)


def test_a_changed_line_installs_no_library_again(tmp_path):
    """The layers of the libraries are taken as they are."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changed = tmp_path / "server/run/loop.py"
    outputs = []
    for line in ("", "# A changed line.\n"):
        changed.write_text(changed.read_text() + line)
        build = ["docker", "compose", "-p", f"fedbasin-e2e-{os.getpid()}", "build", "--progress", "plain", "superlink"]
        start = time.monotonic()
        done = subprocess.run(
            build, cwd=tmp_path / "deploy", capture_output=True, text=True, timeout=MOST_SECONDS, check=False
        )
        seconds = time.monotonic() - start
        outputs.append(done.stdout + done.stderr)
        assert done.returncode == 0, outputs[-1]
    print(f"\n{seconds:.1f} s to build the image after one changed line", file=sys.stderr)
    steps = outputs[1].split("\n\n")
    # Compose puts the service before the stage.
    libraries = [step for step in steps if re.search(r"\[(\w+ )?libraries .*\] (RUN|COPY|WORKDIR)", step)]
    assert libraries
    assert all("CACHED" in step for step in libraries), outputs[1]
    assert any(re.search(r"\[(\w+ )?package ", step) and "CACHED" not in step for step in steps)


def seconds_of_rounds(log):
    return ", ".join(re.findall(r"round finished in (.*? s)", log))


def reached(stack, ports):
    """Networks and ports of services that an unprivileged user of this machine reaches through their bridge."""
    found = set()
    for service, listening in ports.items():
        (container,) = json.loads(docker("inspect", stack.container(service)))
        for name, network in container["NetworkSettings"]["Networks"].items():
            bridge = f"br-{network['NetworkID'][:12]}"
            found |= {
                (name.rpartition("_")[2], port) for port in listening if is_reached(bridge, network["IPAddress"], port)
            }
    return found


def is_reached(*place):
    with multiprocessing.get_context("fork").Pool(1, become_nobody) as unprivileged:
        return unprivileged.apply(connects, place)


def become_nobody():
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def connects(bridge, address, port):
    with socket.socket() as client:
        # No packet leaves this machine, where an address of a closed network would go to the default gateway.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, bridge.encode())
        client.settimeout(2)
        return client.connect_ex((address, port)) == 0
