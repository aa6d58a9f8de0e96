import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.server.files.stored import MLP, answer, fedbasin, perceptron, refusal, saved
from tests.waiting import LONG

ONE_OF_EACH = ["llama", "bert", "gpt2", "t5", "clip", "qwen3", "gpt_neox", "deberta_v2", "roberta", "vit"]


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "distilbert_classes", "bert_spans"])
def test_a_published_architecture_keeps_its_function(name: str, tmp_path: Path) -> None:
    *kinds, whole = answer("check", saved(name, tmp_path / name, shard="4KB"))
    assert whole["kind"] == "all"
    assert whole["spaces"] == sum(kind["spaces"] for kind in kinds)
    assert all(one["double_error"] < 1e-10 and one["passed"] for one in [*kinds, whole])


def test_the_table_says_the_same(tmp_path: Path) -> None:
    done = fedbasin("check", saved("llama", tmp_path / "llama"), "--trials", 1)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["spaces", "number", "float64", "float32", "function"]
    assert [(row[0], row[1], row[-1]) for row in rows[1:]] == [
        ("model.embed_tokens", "1", "kept"),
        ("model.layers.self_attn.q_proj", "2", "kept"),
        ("model.layers.mlp.gate_proj", "2", "kept"),
        ("all", "5", "kept"),
    ]


@pytest.fixture
def broken(tmp_path: Path) -> tuple[Path, Path]:
    """A model and a notation in which one projection was left behind."""
    model = saved("llama", tmp_path / "llama")
    text = fedbasin("inspect", model, "--notation").stdout
    notation = tmp_path / "notation.txt"
    notation.write_text(text.replace(" model.layers.1.mlp.down_proj.weight[1]@1", ""))
    return model, notation


def test_a_broken_symmetry_is_found_and_named(broken: tuple[Path, Path]) -> None:
    model, notation = broken
    done = fedbasin("check", model, "--symmetry", notation)
    assert done.exit_code == 1
    assert "broken by model.layers.1.mlp.gate_proj\n" in done.stdout
    verdicts = {row[0]: row[-1] for row in map(str.split, done.stdout.splitlines()) if row}
    assert verdicts["model.layers.mlp.gate_proj"] == verdicts["all"] == "BROKEN"
    assert verdicts["model.layers.self_attn.q_proj"] == verdicts["model.embed_tokens"] == "kept"


def test_spaces_that_are_whole_pass_beside_a_broken_one(broken: tuple[Path, Path]) -> None:
    model, notation = broken
    done = fedbasin("check", model, "--symmetry", notation, "--spaces", "*.0.mlp.*", "--spaces", "*self_attn*")
    assert done.exit_code == 0


def test_the_seed_decides_the_errors(tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "bert")
    first, again, other = (answer("check", model, "--seed", seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


FACTORY = """
import torch
from torch import nn

def made():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4)

def wide():
    return nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(2, 4)

def nothing():
    return None

def failing():
    return {}["weights"]

def leaving():
    raise SystemExit(3)

class Fails(nn.Sequential):
    def forward(self, x):
        raise ZeroDivisionError("no tokens")

def unrunnable():
    return Fails(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4)
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "factory_of_a_test.py").write_text(FACTORY)
    monkeypatch.delitem(sys.modules, "factory_of_a_test", raising=False)
    return "factory_of_a_test"


def test_a_file_is_checked_with_the_module_of_a_factory(factory: str, tmp_path: Path) -> None:
    model = perceptron(tmp_path / "mlp.safetensors", metadata={"symmetry": MLP})
    kept = answer("check", model, "--module", f"{factory}:made")
    assert [one["kind"] for one in kept] == ["hidden", "all"]
    (tmp_path / "wrong.txt").write_text("hidden  S(6)  0.weight[0] 2.weight[1]\n")
    wrong = ("--symmetry", tmp_path / "wrong.txt")
    assert fedbasin("check", model, "--module", f"{factory}:made", *wrong).exit_code == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wide", "does not fit what factory_of_a_test:wide returns"),
        ("nothing", "returns no `module, input, ...`"),
        ("missing", "has no attribute 'missing'"),
        ("failing", "factory_of_a_test:failing: raised KeyError: 'weights'"),
        ("leaving", "raised SystemExit: 3"),
        ("unrunnable", "no tokens"),
        ("", "write package.module:function"),
    ],
)
def test_a_factory_that_does_not_fit_is_refused(factory: str, tmp_path: Path, function: str, message: str) -> None:
    model = perceptron(tmp_path / "mlp.safetensors", metadata={"symmetry": MLP})
    assert message in refusal("check", model, "--module", f"{factory}:{function}")


def test_a_module_that_is_not_there_is_named(factory: str, tmp_path: Path) -> None:
    model = perceptron(tmp_path / "mlp.safetensors", metadata={"symmetry": MLP})
    assert "No module named 'no_such_module'" in refusal("check", model, "--module", "no_such_module:f")


@pytest.mark.parametrize("command", ["check", "inspect"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "raised ZeroDivisionError while it was imported: division by zero"),
        ("def f(:", "raised SyntaxError while it was imported"),
        ("import sys; sys.exit(2)", "raised SystemExit while it was imported: 2"),
    ],
)
def test_a_module_that_raises_is_refused_by_name(
    factory: str, tmp_path: Path, command: str, text: str, message: str
) -> None:
    model = perceptron(tmp_path / "mlp.safetensors", metadata={"symmetry": MLP} if command == "check" else {})
    (tmp_path / f"{factory}.py").write_text(text)
    assert message in refusal(command, model, "--module", f"{factory}:f")


def test_a_file_alone_asks_for_its_module(tmp_path: Path) -> None:
    model = perceptron(tmp_path / "mlp.safetensors", metadata={"symmetry": MLP})
    assert "give --module" in refusal("check", model)


def test_without_the_library_the_message_says_what_to_install(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "llama")
    code = "import sys; sys.modules['transformers'] = None\nfrom fedbasin.server import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", str(model)], capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 2
    assert done.stderr == 'fedbasin check needs the extra: pip install "fedbasin[files]"\n'


def test_an_architecture_that_the_library_does_not_have_is_named(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "llama")
    config = model / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForChess"))
    assert "architectures says 'LlamaForChess'" in refusal("check", model)


def test_a_head_that_is_missing_leaves_the_stream_in_place(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "llama")
    path = model / "model.safetensors"
    state = {k: v for k, v in load_file(path).items() if k != "lm_head.weight"}
    save_file(state, path, {"format": "pt"})
    kinds = {verdict["kind"]: verdict["passed"] for verdict in answer("check", model, "--trials", 1)}
    assert kinds == {"model.layers.self_attn.q_proj": True, "model.layers.mlp.gate_proj": True, "all": True}
