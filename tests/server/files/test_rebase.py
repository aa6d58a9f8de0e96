"""`fedbasin rebase` and `fedbasin extract` on small models: laws of the results, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from fedbasin.strategies.symmetry.transform import random
from tests.server.files import given
from tests.server.files.stored import answer, fedbasin, perceptron, refusal, tensors
from tests.strategies.symmetry.tiny_transformers import symmetry_of

MODULE = ("--module", "tests.server.files.given:model")
TOKENS = {"input_ids": torch.arange(12)[None] % 31}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=31))


def tied_llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=31, tie_word_embeddings=True))


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=31, n_positions=16))


def vit() -> Any:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3))


def disturb(model: nn.Module, size: float, seed: int = 1, part: str = "") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_base_that_was_only_moved_takes_the_fine_tuning_with_it(make: Any, folder: Path) -> None:
    model = make()
    transform = random(symmetry_of(model), torch.Generator().manual_seed(1))
    model.save_pretrained("old")
    new = make()
    new.load_state_dict(transform.act(model.state_dict()))
    new.save_pretrained("new", max_shard_size="9KB")
    disturb(model, 0.01)
    model.save_pretrained("fine")
    (report,) = answer("rebase", "old", "fine", "new", "-o", "out")
    assert report["alignment"]["distance_after"] < 1e-3
    assert report["change"] < 1e-8
    assert report["kept"] == report["changed"] > 0
    with torch.no_grad():
        carried, model = type(model).from_pretrained("out")(**TOKENS).logits, model.eval()
        torch.testing.assert_close(carried, model(**TOKENS).logits, atol=2e-5, rtol=1e-4)
    assert len(list(Path("out").glob("*.safetensors"))) > 1


def test_an_old_base_that_is_the_new_one_gives_the_fine_tuning_back(folder: Path) -> None:
    model = gpt2()
    model.save_pretrained("old")
    disturb(model, 0.1)
    model.save_pretrained("fine")
    assert not fedbasin("rebase", "old", "fine", "old", "-o", "out").exit_code
    assert not fedbasin("rebase", "old", "fine", "old", "-o", "half", "--strength", 0.5, "--no-align").exit_code
    old, fine, out, half = (tensors(Path(name)) for name in ("old", "fine", "out", "half"))
    for name, tensor in fine.items():
        torch.testing.assert_close(out[name], tensor, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(half[name], (old[name] + tensor) / 2, atol=1e-6, rtol=1e-6)


def gradient_votes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    module, _ = given.model()
    module.load_state_dict(state)
    votes = {name: torch.zeros_like(parameter) for name, parameter in state.items()}
    for inputs, targets in given.rows():
        for row in range(len(targets)):
            module.zero_grad()
            cross_entropy(module(inputs[row : row + 1]), targets[row : row + 1]).backward()
            for name, parameter in module.named_parameters():
                votes[name] -= parameter.grad.sign()
    return votes


def test_data_keep_what_most_examples_want(folder: Path) -> None:
    old, fine, new = (perceptron(folder / f"{seed}.safetensors", seed) for seed in (1, 2, 3))
    data = ("--data", "tests.server.files.given:rows", "--no-align", *MODULE)
    symmetry = folder / "s.txt"
    symmetry.write_text("hidden  S(6)  0.weight[0] 0.bias[0] 2.weight[1]\n")
    (report,) = answer("rebase", old, fine, new, "-o", "out.safetensors", *data, "--symmetry", symmetry)
    states = [load_file(path) for path in (old, fine, new)]
    votes, out = gradient_votes(states[2]), load_file("out.safetensors")
    kept = 0
    for name, base in states[2].items():
        change = states[1][name] - states[0][name]
        expected = change * (change * votes[name] > 0)
        torch.testing.assert_close(out[name] - base, expected, atol=1e-6, rtol=1e-5)
        kept += int(expected.count_nonzero())
    assert report["kept"] == kept
    assert 0 < kept < report["changed"]


def test_rebase_refuses_what_does_not_fit(folder: Path) -> None:
    old, fine = (perceptron(folder / f"{seed}.safetensors", seed) for seed in (1, 2))
    state = load_file(old)
    save_file({**state, "0.bias": torch.full((6,), torch.inf)}, "infinite.safetensors")
    save_file({**state, "0.bias": torch.zeros(7)}, "wide.safetensors")
    save_file({name: t for name, t in state.items() if name != "0.bias"}, "lacking.safetensors")
    rest = ("-o", "out.safetensors", *MODULE)
    assert "'0.bias' has entries that are infinite" in refusal("rebase", old, "infinite.safetensors", old, *rest)
    assert "(6,) for (7,)" in refusal("rebase", old, "wide.safetensors", fine, *rest)
    assert "has no tensor '0.bias'" in refusal("rebase", old, fine, "lacking.safetensors", *rest)
    assert "--task: belongs to --data" in refusal("rebase", old, fine, fine, *rest, "--task", "regression")
    assert "choose a smaller --strength" in refusal("rebase", old, fine, fine, *rest, "--strength", 1e39, "--no-align")
    assert "is 2.safetensors itself" in refusal("rebase", old, "2.safetensors", old, "-o", "2.safetensors", *MODULE)
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize("make", [llama, tied_llama, gpt2, vit])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_full_rank_is_the_fine_tuned_model(make: Any, folder: Path) -> None:
    model = make()
    inputs = TOKENS if make is not vit else {"pixel_values": torch.ones(1, 3, 8, 8)}
    model.save_pretrained("base")
    disturb(model.eval(), 0.1)
    model.save_pretrained("fine")
    (report,) = answer("extract", "base", "fine", "-o", "adapter", "--rank", 99)
    assert report["kept"] == pytest.approx(1.0, abs=1e-9)
    with torch.no_grad():
        expected = model(**inputs).logits
        adapted = PeftModel.from_pretrained(type(model).from_pretrained("base"), "adapter").eval()
        torch.testing.assert_close(adapted(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert not fedbasin("merge", "base+adapter", "--rule", "passthrough", "-o", "out").exit_code
    fine, out = tensors(Path("fine")), tensors(Path("out"))
    for name, tensor in fine.items():
        torch.testing.assert_close(out[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_smaller_rank_keeps_the_largest_singular_values(folder: Path) -> None:
    model = llama()
    model.save_pretrained("base")
    disturb(model, 0.1, part="q_proj")
    model.save_pretrained("fine")
    (report,) = answer("extract", "base", "fine", "-o", "adapter", "--rank", 2)
    assert set(report["layers"].values()) == {2}
    assert len(report["layers"]) == 2
    base, fine = tensors(Path("base")), tensors(Path("fine"))
    kept = total = 0.0
    factors = load_file("adapter/adapter_model.safetensors")
    for name in report["layers"]:
        change = (fine[f"{name}.weight"] - base[f"{name}.weight"]).double()
        values = torch.linalg.svdvals(change)
        kept, total = kept + float(values[:2].square().sum()), total + float(values.square().sum())
        product = factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
        assert float((product - change).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-4)
    assert report["kept"] == pytest.approx(kept / total)
    assert json.loads(Path("adapter/adapter_config.json").read_text())["r"] == 2


def test_extract_refuses_what_has_no_adapter(folder: Path) -> None:
    gpt2().save_pretrained("base")
    llama().save_pretrained("other")
    assert "hold the same tensors" in refusal("extract", "base", "base", "-o", "adapter")
    assert "has no tensor" in refusal("extract", "base", "other", "-o", "adapter")
    Path("full").mkdir()
    assert "holds no adapter" in refusal("extract", "base", "other", "-o", "full", "--force")
