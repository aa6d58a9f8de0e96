"""The README's quickstart by `flwr run`, as a user starts it."""

import importlib.util
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedbasin
from fedbasin.deploy.local import deployment
from tests.quickstart_app import write_app
from tests.waiting import LONG

pytestmark = pytest.mark.deployed

# Of the processes: they have other working directories, where a relative path leads nowhere.
ENVIRONMENT = {"PYTHONPATH": str(Path(fedbasin.__file__).parent.parent)}

LINES_OF_A_ROUND = [
    r"\[ROUND {number}/{rounds}\]",
    r"fuse: 2 of 2 clients accepted in .* MB up, .* MB down",
    r"evaluate: 2 of 2 clients accepted in .*",
    r"train: train_loss [\d.]+.*",
    r"evaluate \(clients\): eval_loss [\d.]+.*, eval_acc [\d.]+.*",
    r"evaluate \(server\): accuracy [\d.]+.*, loss [\d.]+.*",
    r"round finished in [\d.]+ s",
]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return write_app(tmp_path_factory.mktemp("app") / "quickstart")


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    configs = "partition-id={} num-partitions=2".format
    with deployment(2, configs, folder, ENVIRONMENT, LONG) as online:
        yield online


def run_quickstart(online, app, recipe, rounds):
    """Runs the app, and checks what it logged and what it left behind."""
    config = {"fedbasin.recipe": recipe, "num-server-rounds": rounds}
    run = online.run(app, config, timeout_seconds=LONG)
    log = "\n".join(line for line in run.log if line.startswith("INFO"))  # not what ray prints
    assert f"fedbasin: recipe {recipe}; all other settings at their defaults" in log
    # Flower's stream of the log can lose a line, so each is looked for in all rounds together.
    for line in (line.format(number=rounds, rounds=rounds) for line in LINES_OF_A_ROUND):
        assert re.search(rf"INFO : +{line}", log), log
    assert f"See it: fedbasin report runs/{run.run_id}" in log

    folder = online.folder / "runs" / str(run.run_id)
    reports = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [report["recipe"] for report in reports] == [recipe] * rounds
    saved = torch.load(online.folder / "final_model.pt", weights_only=True)
    torch.testing.assert_close(saved, load_file(folder / "global.safetensors"), rtol=0, atol=0)


@pytest.mark.parametrize(("recipe", "rounds"), [pytest.param("fedavg", 1, marks=pytest.mark.slow), ("regmean", 2)])
def test_the_quickstart_runs_on_supernodes(online, app, recipe, rounds):
    run_quickstart(online, app, recipe, rounds)


def test_the_quickstart_runs_in_the_simulation_engine(app, tmp_path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip('needs Flower\'s simulation engine (pip install "fedbasin[simulation]")')
    # Ray names sockets in its folder, whose paths must be shorter than those of pytest's folders.
    with (
        tempfile.TemporaryDirectory() as ray,
        deployment(0, str, tmp_path, ENVIRONMENT | {"RAY_TMPDIR": ray}, LONG, simulation=True) as online,
    ):
        run_quickstart(online, app, "regmean", 2)
