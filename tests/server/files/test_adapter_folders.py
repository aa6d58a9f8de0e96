"""Adapters as `peft` writes them by default, damaged or unusual folders, and what the commands say of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.server.files.stored import answer, fedbasin, refusal
from tests.server.files.test_adapters import TOKENS, near

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]}


def base_model(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=31, **settings))


def adapted(
    folder: Path, base: nn.Module | None = None, seed: int = 0, tables: bool | str = "auto", **settings: Any
) -> Path:
    """Save an adapter as `peft` does by default, which stores tables that have changed if it finds their base."""
    model = get_peft_model(base or base_model(), LoraConfig(**LINEAR | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=tables)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, with a base, one whose head is tied, and the adapter a."""
    monkeypatch.chdir(tmp_path)
    base_model().save_pretrained("base")
    base_model(tie_word_embeddings=True).save_pretrained("tied")
    adapted(Path("a"))
    return tmp_path


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.double().eval()(TOKENS).logits


TABLES = {
    "table": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "table dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
}


@pytest.mark.parametrize("kind", TABLES)
def test_an_adapter_is_added_to_the_table_that_is_stored_beside_it(folder: Path, kind: str) -> None:
    base = base_model()
    with torch.no_grad():
        for table in (base.get_input_embeddings(), base.get_output_embeddings()):
            table.weight.add_(1)
    adapted(folder / "tables", base, **TABLES[kind])
    expected = logits(PeftModel.from_pretrained(base_model(), "tables"))
    assert not fedbasin("merge", "base+tables", "--rule", "passthrough", "-o", "whole").exit_code
    near(logits(LlamaForCausalLM.from_pretrained("whole")), expected)
    assert not fedbasin("merge", "tables", "--rule", "linear", "-o", "again").exit_code
    near(logits(PeftModel.from_pretrained(base_model(), "again")), expected)


@pytest.mark.parametrize("alpha", [2, 5])
def test_a_tied_head_that_repeats_the_table_is_taken_at_every_scale(folder: Path, alpha: int) -> None:
    settings = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "lora_alpha": alpha}
    adapted(folder / "tables", base_model(tie_word_embeddings=True), **settings)
    expected = logits(PeftModel.from_pretrained(base_model(tie_word_embeddings=True), "tables"))
    assert not fedbasin("merge", "tied+tables", "--rule", "passthrough", "-o", "whole").exit_code
    near(logits(LlamaForCausalLM.from_pretrained("whole")), expected)


def test_table_and_head_that_were_trained_apart_are_refused_where_the_base_ties_them(folder: Path) -> None:
    modules = ["embed_tokens", "lm_head"]
    adapted(folder / "apart", base_model(tie_word_embeddings=True), modules_to_save=modules)
    assert "has one weight for both" in refusal("merge", "tied+apart", "--rule", "passthrough", "-o", "out")


def test_a_table_of_another_size_is_refused_and_corrupts_nothing(folder: Path) -> None:
    base = base_model()
    base.resize_token_embeddings(35)
    adapted(folder / "resized", base, tables=True)
    said = refusal("merge", "base+resized", "--rule", "passthrough", "-o", "out")
    assert "of shape (35, 16), which is (31, 16) in base" in said
    base = base_model()
    base.resize_token_embeddings(35)
    base.save_pretrained("wider")
    assert not fedbasin("merge", "wider+resized", "--rule", "passthrough", "-o", "out").exit_code
    near(logits(LlamaForCausalLM.from_pretrained("out")), logits(PeftModel.from_pretrained(base, "resized")))


def test_a_trained_module_that_the_base_lacks_is_refused(folder: Path) -> None:
    state = load_file("a/adapter_model.safetensors")
    save_file(state | {"base_model.model.score.weight": torch.ones(2, 16)}, "a/adapter_model.safetensors")
    said = refusal("merge", "base+a", "--rule", "passthrough", "-o", "out")
    assert said.startswith("a: holds 'score.weight', which base does not have")


def test_the_report_of_merged_adapters_names_their_bases(folder: Path) -> None:
    for name in ("first", "second"):
        path = Path(shutil.copytree("a", name)) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": f"hub/{name}"}))
    (report,) = answer("merge", "first", "second", "--rule", "linear", "--rank", 3, "-o", "out")
    assert report == {
        "rule": "linear",
        "adapters": ["first", "second"],
        "output": "out",
        "layers": 4,
        "rank": 3,
        "bases": ["hub/first", "hub/second"],
    }
    shown = fedbasin("merge", "first", "second", "--rule", "linear", "-o", "again").stdout
    assert "linear of 2 adapters: 4 layers, rank at most 4" in shown
    assert "the adapters name several bases: 'hub/first', 'hub/second'" in " ".join(shown.split())
    (report,) = answer("merge", "base+first", "--rule", "passthrough", "-o", "whole")
    assert report["bases"] == {"base+first": "hub/first"}


CONFIGS = {
    "rank_pattern": ([1], "rank_pattern is [1]; it must have names of modules and numbers"),
    "alpha_pattern": ({"(": 3}, "alpha_pattern has the pattern '('"),
    "lora_alpha": (True, "lora_alpha is True, so the scale of"),
    "use_dora": (True, "has no magnitude, but use_dora is True"),
    "peft_type": ("ADALORA", "init_r is None, which the scale is divided by"),
    "a_later_key": ({"b": 1}, "a_later_key is {'b': 1}, which is not known to be a low-rank product"),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused_by_name(folder: Path, key: str) -> None:
    value, reason = CONFIGS[key]
    path = folder / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert reason in refusal("merge", "base+a", "--rule", "passthrough", "-o", "out")


def test_a_magnitude_that_is_switched_off_is_refused(folder: Path) -> None:
    path = adapted(folder / "dora", use_dora=True) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    assert "has a magnitude, but use_dora is False" in refusal("merge", "dora", "--rule", "linear", "-o", "out")


def test_adapters_that_are_not_finite_are_refused(folder: Path) -> None:
    huge = (
        "merge",
        "a",
        "--rule",
        "linear",
        "-p",
        "normalize=false",
        "--weight",
        1e8,
        "--dtype",
        "float16",
        "-o",
        "out",
    )
    assert "not finite in torch.float16; choose a wider dtype or smaller weights" in refusal(*huge)
    state = load_file("a/adapter_model.safetensors")
    name = next(iter(state))
    save_file(state | {name: state[name] * torch.nan}, "a/adapter_model.safetensors")
    said = refusal("merge", "a", "--rule", "linear", "-o", "out")
    assert said.startswith(f"a/adapter_model.safetensors: {name!r} is infinite or not a number")
    assert not Path("out").exists()


def test_several_adapters_in_one_folder_are_named(folder: Path) -> None:
    model = get_peft_model(base_model(), LoraConfig(**LINEAR))
    model.add_adapter("second", LoraConfig(**LINEAR))
    model.save_pretrained("several", selected_adapters=["second"])
    said = refusal("merge", "base+several", "--rule", "passthrough", "-o", "out")
    assert said == "several: has no adapter_config.json; give one of 'several/second'"
    assert not fedbasin("merge", "base+several/second", "--rule", "passthrough", "-o", "out").exit_code


def test_options_of_models_are_refused_for_adapters(folder: Path) -> None:
    assert "--shard-size: adapters are one file" in refusal(
        "merge", "a", "--rule", "linear", "--shard-size", 1, "-o", "out"
    )
    said = refusal("merge", "a", "a", "--rule", "karcher", "-o", "out")
    assert "for karcher write BASE+ADAPTER, which merges adapted models" in said
