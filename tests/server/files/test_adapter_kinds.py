"""Adapters drawn from all settings of `peft` that go together: written anew, and applied, they compute the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.server.files.stored import fedbasin
from tests.server.files.test_adapters import TOKENS, near

LAYERS = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_fc", "c_proj", "wte"],
}


def base_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=31, n_positions=16))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=31, attention_bias=True))


def drawn(family: str, seed: int) -> dict[str, Any]:
    """Return settings of an adapter."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values: list[Any]) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    layers = [name for name in LAYERS[family] if pick([True, False])] or LAYERS[family][:1]
    rest = [name for name in ("lm_head", "embed_tokens", "wte") if name in LAYERS[family] and name not in layers]
    bias = pick(["none", "none", "all", "lora_only"])
    dora = pick([True, False, False])
    return {
        "target_modules": layers,
        "r": pick([1, 3, 5]),
        "lora_alpha": pick([1, 4, 7.5]),
        "use_rslora": pick([True, False]),
        "use_dora": dora,
        "bias": bias,
        # peft has neither for embeddings, and no bias of a factor beside DoRA.
        "lora_bias": not dora and bias == "none" and not {"embed_tokens", "wte"} & set(layers) and pick([True, False]),
        "rank_pattern": pick([{}, {layers[0]: 2}, {f"1.*{layers[0]}": 4}]),
        "alpha_pattern": pick([{}, {layers[0]: 3}, {f"0.*{layers[0]}": 0.5}]),
        "modules_to_save": pick([None, rest[:1] or None]),
        "layers_to_transform": pick([None, None, [1]])
        if not {"embed_tokens", "wte", "lm_head"} & set(layers)
        else None,
        "fan_in_fan_out": family == "gpt2",
    }


def refused(family: str, settings: dict[str, Any]) -> str:
    """Return why the base cannot hold the adapter: it has one weight for table and head, or no place for a bias."""
    if family == "gpt2" and "wte" in [*settings["target_modules"], *(settings["modules_to_save"] or [])]:
        return "has one weight for both"
    without_bias = {"up_proj", "down_proj", "lm_head"} & set(settings["target_modules"])
    return "has a bias for" if family == "llama" and settings["lora_bias"] and without_bias else ""


def saved(family: str, settings: dict[str, Any], folder: Path, seed: int) -> None:
    model = get_peft_model(base_model(family), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.1 * noise if "magnitude" in name or "bias" in name else 0.3 * noise)
    model.save_pretrained(folder, save_embedding_layers=False)


def logits(family: str, adapter: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(base_model(family), adapter).double().eval()(TOKENS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 40))])
def test_an_adapter_of_any_settings_computes_the_same(family: str, seed: int, tmp_path: Path) -> None:
    settings = drawn(family, seed)
    saved(family, settings, tmp_path / "a", seed)
    expected = logits(family, tmp_path / "a")
    done = fedbasin("merge", tmp_path / "a", "--rule", "linear", "-o", tmp_path / "out")
    assert done.exit_code == 0, (settings, done.output)
    near(logits(family, tmp_path / "out"), expected)
    base_model(family).save_pretrained(tmp_path / "base")
    done = fedbasin("merge", f"{tmp_path}/base+{tmp_path}/a", "--rule", "passthrough", "-o", tmp_path / "whole")
    if refusal := refused(family, settings):
        assert done.exit_code == 2, (settings, done.output)
        assert refusal in " ".join(done.stderr.split())
        return
    assert done.exit_code == 0, (settings, done.output)
    with torch.no_grad():
        near(type(base_model(family)).from_pretrained(tmp_path / "whole").double().eval()(TOKENS).logits, expected)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_small_rank_and_the_rest_in_the_base_are_the_exact_mean(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 6}
    for seed, name in enumerate("ab"):
        saved("llama", settings, tmp_path / name, seed)
    base_model("llama").save_pretrained(tmp_path / "base")
    base, a, b, small, mean, rest = (tmp_path / name for name in ("base", "a", "b", "small", "mean", "rest"))
    for command in (
        (a, b, "--rule", "linear", "--rank", 3, "-o", small),
        (f"{base}+{a}", f"{base}+{b}", "--rule", "linear", "-o", mean),
        (
            mean,
            f"{base}+{small}",
            "--rule",
            "task_arithmetic",
            "--anchor",
            base,
            "--weight",
            1,
            "--weight",
            -1,
            "-o",
            rest,
        ),
    ):
        done = fedbasin("merge", *command)
        assert done.exit_code == 0, done.output
    with torch.no_grad():
        exact = LlamaForCausalLM.from_pretrained(mean).double().eval()(TOKENS).logits
        adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(rest), small).double().eval()
        near(adapted(TOKENS).logits, exact)
