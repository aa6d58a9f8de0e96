"""The command line where the observer wants a token, and where it hands out models."""

import torch
from typer.testing import CliRunner

from fedbasin.server.cli import app
from fedbasin.server.observe.access import Guard, Pass
from fedbasin.server.run.resumption.checkpoint import Checkpoint, save
from tests.observing import observer, push, report

TOKEN = "a-token-of-the-tests"


def fedbasin(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_rounds_and_watch_show_the_token_of_the_file(tmp_path):
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    with observer(guard=Guard(token_file=token_file)) as addresses:
        assert push(addresses.observer, report(1, last=True), credentials=Pass(token_file=token_file))
        for command in ("rounds", "watch"):
            shown = fedbasin(command, addresses.observer, "--token-file", token_file, "--json")
            assert (shown.exit_code, shown.stdout.count('"round": 1')) == (0, 1)
            refused = fedbasin(command, addresses.observer)
            assert refused.exit_code == 1
            assert "see --token-file" in refused.stderr


def test_download_writes_the_model_and_says_its_round(tmp_path):
    save(tmp_path / "runs" / "7", Checkpoint(3, {"weight": torch.ones(4)}, "{}"))
    target = tmp_path / "model.safetensors"
    with observer(models=tmp_path / "runs") as addresses:
        shown = fedbasin("download", "7", addresses.observer, "-o", target)
        assert (shown.exit_code, shown.stdout) == (0, f"{target}: round 3\n")
        refused = fedbasin("download", "8", addresses.observer, "-o", target)
    assert refused.exit_code == 1
    assert "no run '8' here; there are: 7" in refused.stderr


def test_observe_refuses_a_token_that_all_could_read_and_names_the_options(tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    refused = fedbasin("observe", "--host", "0.0.0.0", "--token-file", tmp_path / "token")
    assert refused.exit_code == 1
    assert "--tls-cert" in refused.stderr
