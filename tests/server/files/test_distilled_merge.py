"""`fedbasin merge --distill` on small models: closer to the ensemble, never further, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.server.files import given
from tests.server.files.stored import MLP, answer, fedbasin, perceptron, refusal, saved, tensors

GIVEN = "tests.server.files.given"
MODULE = ("--module", f"{GIVEN}:model")
MERGE = ("merge", "1.safetensors", "2.safetensors", "--rule", "linear", *MODULE, "-o", "o.safetensors")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        perceptron(tmp_path / f"{seed}.safetensors", seed, {"symmetry": MLP})
    return tmp_path


def divergence(state: dict[str, Tensor]) -> float:
    """Return the mean divergence from the softmax of the mean logits, over the two batches."""
    values = []
    for inputs in given.inputs():
        logits = []
        for tensors_ in (load_file("1.safetensors"), load_file("2.safetensors"), state):
            module, _ = given.model()
            module.load_state_dict(tensors_)
            logits.append(module(inputs).detach())
        teacher, student = ((logits[0] + logits[1]) / 2).log_softmax(-1), logits[2].log_softmax(-1)
        values.append(float((teacher.exp() * (teacher - student)).sum(-1).mean()))
    return sum(values) / len(values)


def distilled(*options: object) -> dict[str, Any]:
    (record,) = answer(*MERGE, "--distill", f"{GIVEN}:inputs", *options)
    return record["distillation"]


def test_the_merge_comes_closer_to_the_ensemble_on_inputs_without_labels(folder: Path) -> None:
    fedbasin("merge", "1.safetensors", "2.safetensors", "--rule", "linear", "-o", "mean.safetensors")
    report = distilled("--distill-passes", 20, "--distill-rate", 0.05)
    assert report["before"] == pytest.approx(divergence(load_file("mean.safetensors")), rel=1e-4)
    assert report["after"] == pytest.approx(divergence(load_file("o.safetensors")), rel=1e-4)
    assert report["after"] < 0.5 * report["before"]


def test_labels_change_nothing(folder: Path) -> None:
    distilled()
    first = load_file("o.safetensors")
    answer(*MERGE, "--distill", f"{GIVEN}:rows", "--force")
    assert all(torch.equal(tensor, first[name]) for name, tensor in load_file("o.safetensors").items())


def test_steps_that_lead_away_are_not_taken(folder: Path) -> None:
    report = distilled("--distill-rate", 30.0, "--distill-passes", 2)
    assert report["after"] == report["before"]
    fedbasin("merge", "1.safetensors", "2.safetensors", "--rule", "linear", "-o", "mean.safetensors")
    merged = load_file("o.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in load_file("mean.safetensors").items())


@pytest.mark.parametrize("task", ["regression", "multi-label"])
def test_other_tasks_have_their_own_divergence(task: str, folder: Path) -> None:
    report = distilled("--task", task, "--distill-passes", 15, "--distill-rate", 0.05)
    assert 0 < report["after"] < 0.5 * report["before"]


def test_the_ensemble_of_aligned_models_is_that_of_the_models(folder: Path) -> None:
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    state = load_file("1.safetensors")
    moved = {"0.weight": state["0.weight"][order], "0.bias": state["0.bias"][order], "2.bias": state["2.bias"]}
    save_file({**moved, "2.weight": state["2.weight"][:, order].contiguous()}, "2.safetensors", {"symmetry": MLP})
    report = distilled("--align", "star")
    assert report["before"] < 1e-10


def test_equal_models_are_their_ensemble(folder: Path) -> None:
    save_file(load_file("1.safetensors"), "2.safetensors")
    assert distilled() == {"before": 0, "after": 0}
    assert torch.equal(load_file("o.safetensors")["0.weight"], load_file("1.safetensors")["0.weight"])


def test_a_language_model_is_distilled_on_padded_text(folder: Path) -> None:
    for seed, name in enumerate("ab"):
        saved("gpt2", folder / name)
        state = tensors(folder / name)
        noise = torch.Generator().manual_seed(seed)
        changed = {n: t + 0.3 * torch.randn(t.shape, generator=noise) for n, t in state.items()}
        save_file(changed, folder / name / "model.safetensors", {"format": "pt"})
    merge = ("merge", "a", "b", "--rule", "linear", "--dtype", "float16", "-o", "out")
    (record,) = answer(*merge, "--distill", f"{GIVEN}:padded", "--distill-passes", 3)
    assert record["distillation"]["after"] < record["distillation"]["before"]
    assert {tensor.dtype for tensor in tensors(folder / "out").values()} == {torch.float16}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--distill", f"{GIVEN}:wide"], "cannot be evaluated on it"),
        (["--distill", f"{GIVEN}:nothing"], "returns no batches"),
        (["--distill", f"{GIVEN}:lost"], "has no attribute 'lost'"),
        (["--distill", f"{GIVEN}:inputs", "--task", "colours"], "--task colours: is unknown"),
        (["--distill", f"{GIVEN}:inputs", "--distill-rate", "0"], "distill.rate"),
        (["--distill", f"{GIVEN}:inputs", "--distill-rate", "1e30"], "choose a smaller rate"),
        (["--distill-passes", "3"], "belongs to --distill"),
        (["--distill", f"{GIVEN}:inputs", "--score", f"{GIVEN}:closeness", "--search", "3"], "search first"),
    ],
)
def test_what_is_refused(options: list[str], words: str, folder: Path) -> None:
    assert words in refusal(*MERGE, *options)
    assert not Path("o.safetensors").exists()
