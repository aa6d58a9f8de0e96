"""`fedbasin barrier` on small models: the two lines, the picture, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

from tests.server.files import given
from tests.server.files.stored import answer, fedbasin, perceptron, planted, refusal, saved

GIVEN = "tests.server.files.given"
MODULE = ("--module", f"{GIVEN}:model")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_transformed_copy_has_no_barrier_once_it_is_aligned(name: str, folder: Path) -> None:
    anchor = saved(name, folder / "a")
    planted(name, folder / "b", shard="9KB")
    data = f"{GIVEN}:tokens"
    (result,) = answer("barrier", anchor, "b", "--data", data, "--points", 5, "--picture", "lines.html")
    before, after = result["before"], result["after"]
    assert result["t"] == [0, 0.25, 0.5, 0.75, 1]
    assert after["loss"] == pytest.approx([before["loss"][0]] * 5, rel=1e-4)
    assert before["loss"][-1] == pytest.approx(before["loss"][0], rel=1e-4)
    assert max(abs(x - before["loss"][0]) for x in before["loss"]) > 1e-3
    assert after["barriers"]["linear"] < 1e-4
    page = Path("lines.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<figure") == 2
    assert "http" not in page


def test_the_line_of_a_file_is_that_of_its_module(folder: Path) -> None:
    a, b = (perceptron(folder / f"{seed}.safetensors", seed) for seed in (1, 2))
    arguments = (*MODULE, "--data", f"{GIVEN}:rows", "--points", 3)
    (result,) = answer("barrier", a, b, *arguments)
    assert result["examples"] == 10
    assert result["distance_after"] < result["distance_before"]
    for end in (0, 2):
        assert result["before"]["loss"][end] == pytest.approx(result["after"]["loss"][end], rel=1e-5)
        assert result["before"]["accuracy"][end] == result["after"]["accuracy"][end]
    states = load_file(a), load_file(b)
    module, _ = given.model()
    module.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    losses = [float(cross_entropy(module(x), y, reduction="sum").detach()) for x, y in given.rows()]
    assert result["before"]["loss"][1] == pytest.approx(sum(losses) / 10, rel=1e-5)
    loss = correct = 0.0
    for x, y in given.rows():
        probabilities = []
        for state in states:
            module.load_state_dict(state)
            probabilities.append(module(x).detach().softmax(-1) / 2)
        mean = probabilities[0] + probabilities[1]
        loss -= float(mean.gather(1, y[:, None]).log().sum()) / 10
        correct += float((mean.argmax(-1) == y).sum()) / 10
    assert result["ensemble"] == {"loss": pytest.approx(loss, rel=1e-5), "accuracy": pytest.approx(correct)}


def test_a_task_without_classes_has_no_accuracy(folder: Path) -> None:
    a, b = (perceptron(folder / f"{seed}.safetensors", seed) for seed in (1, 2))
    arguments = (*MODULE, "--data", f"{GIVEN}:numbers")
    (result,) = answer("barrier", a, b, *arguments)
    assert result["before"]["accuracy"] == []
    assert result["ensemble"] is None
    done = fedbasin("barrier", a, b, *arguments, "--task", "regression")
    assert "accuracy" not in done.stdout
    assert "ensemble" not in done.stdout
    assert "barrier " in done.stdout


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ("rows", ["--task", "colours"], "--task colours: is unknown"),
        ("nothing", [], "returns no batches"),
        ("number", [], "is a int; name a function"),
        ("fails", [], "OSError: no such disk"),
        ("ends", [], "SystemExit: 3"),
        ("lost", [], "has no attribute 'lost'"),
        ("wide", [], "cannot be evaluated on it"),
        ("rows", ["--picture", "1.safetensors"], "is 1.safetensors itself"),
        ("rows", ["--picture", "no/lines.html"], "its folder does not exist"),
        ("rows", ["--picture", "folder", "--force"], "is a folder"),
    ],
)
def test_what_is_refused(data: str, options: list[str], words: str, folder: Path) -> None:
    for seed in (1, 2):
        perceptron(folder / f"{seed}.safetensors", seed)
    Path("folder").mkdir()
    arguments = ("1.safetensors", "2.safetensors", *MODULE, "--data", f"{GIVEN}:{data}")
    assert words in refusal("barrier", *arguments, *options)
    assert not Path("lines.html").exists()


def test_a_model_without_its_head_is_refused(folder: Path) -> None:
    saved("llama", folder / "a")
    config = json.loads(Path("a/config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    Path("a/config.json").write_text(json.dumps(config))
    assert "score.weight" in refusal("barrier", "a", "a", "--data", f"{GIVEN}:tokens")


@pytest.mark.parametrize("data", ["tokens", "decoded"])
def test_encoder_decoders_decode_from_the_labels(data: str, folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 12, "d_kv": 4, "d_ff": 10, "num_layers": 2, "num_heads": 3, "vocab_size": 31}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, dropout_rate=0))
    model.save_pretrained("a")
    (result,) = answer("barrier", "a", "a", "--data", f"{GIVEN}:{data}", "--points", 3)
    (batch,) = given.tokens()
    assert result["before"]["loss"][0] == pytest.approx(float(model.eval()(**batch).loss.detach()), rel=1e-5)
    for command in (
        ("--rule", "regmean", "--statistics", f"{GIVEN}:{data}"),
        ("--rule", "linear", "--distill", f"{GIVEN}:{data}", "--distill-passes", 1),
        ("--rule", "linear", "--align", "star", "--matcher", "activations", "--align-data", f"{GIVEN}:{data}"),
    ):
        shutil.copytree("a", "b", dirs_exist_ok=True)
        done = fedbasin("merge", "a", "b", *command, "-o", "out", "--force")
        assert done.exit_code == 0, done.output
