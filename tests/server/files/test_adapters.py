"""Adapters of the peft library, of every kind: merged, applied, and read back by peft itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.server.files.stored import fedbasin, refusal

LINEAR = ["q_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 12, "target_modules": LINEAR},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": LINEAR,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 6},
        "alpha_pattern": {"layers.1.*q_proj": 1},
    },
    "rslora patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": LINEAR,
        "rank_pattern": {"down_proj": 9},
        "use_rslora": True,
    },
    "dora": {"r": 4, "lora_alpha": 12, "target_modules": LINEAR, "use_dora": True},
    "bias": {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["c_attn", "c_proj"],
        "lora_bias": True,
        "fan_in_fan_out": True,
    },
    "transposed dora": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["c_attn"],
        "use_dora": True,
        "fan_in_fan_out": True,
    },
    "embedding": {"r": 4, "lora_alpha": 12, "target_modules": ["embed_tokens", "q_proj"]},
    "embedding dora": {"r": 4, "lora_alpha": 12, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "adalora": {"init_r": 4, "target_r": 2, "lora_alpha": 12, "target_modules": LINEAR, "total_step": 10},
}
TOKENS = torch.arange(12)[None] % 31


def base_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if KINDS[kind].get("fan_in_fan_out"):
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=31, n_positions=16))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=31))


def adapted(kind: str, folder: Path, seed: int = 0, **changes: Any) -> Tensor:
    """Write an adapter with random factors, and return the logits of its model, as peft loads it again."""
    settings = KINDS[kind] | changes
    config = (AdaLoraConfig if kind == "adalora" else LoraConfig)(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base_model(kind), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.1 * noise if "magnitude" in name else 0.3 * noise)
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits(kind, folder)


def logits(kind: str, folder: Path) -> Tensor:
    model = PeftModel.from_pretrained(base_model(kind), folder).double().eval()
    with torch.no_grad():
        return model(TOKENS).logits


def near(result: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert float((result - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_with_weight_1_computes_the_same(kind: str, tmp_path: Path) -> None:
    expected = adapted(kind, tmp_path / "a")
    done = fedbasin("merge", tmp_path / "a", "--rule", "linear", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    near(logits(kind, tmp_path / "out"), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_in_its_base_computes_the_same(kind: str, tmp_path: Path) -> None:
    expected = adapted(kind, tmp_path / "a")
    base_model(kind).save_pretrained(tmp_path / "base")
    done = fedbasin("merge", f"{tmp_path}/base+{tmp_path}/a", "--rule", "passthrough", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    model = type(base_model(kind)).from_pretrained(tmp_path / "out").double().eval()
    with torch.no_grad():
        near(model(TOKENS).logits, expected)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_any_alpha_rank_and_rule_add_up_as_their_bases_do(tmp_path: Path) -> None:
    adapted("lora", tmp_path / "a", 1)
    adapted("rslora", tmp_path / "b", 2)
    adapted("patterns", tmp_path / "c", 3)
    base_model("lora").save_pretrained(tmp_path / "base")
    weights = [argument for weight in (0.5, 2, 1.5) for argument in ("--weight", weight)]
    adapters = [tmp_path / name for name in "abc"]
    assert not fedbasin("merge", *adapters, "--rule", "linear", *weights, "-o", tmp_path / "sum").exit_code
    models = [f"{tmp_path}/base+{adapter}" for adapter in adapters]
    assert not fedbasin("merge", *models, "--rule", "linear", *weights, "-o", tmp_path / "whole").exit_code
    with torch.no_grad():
        whole = LlamaForCausalLM.from_pretrained(tmp_path / "whole").double().eval()(TOKENS).logits
    near(logits("lora", tmp_path / "sum"), whole)
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["r"] == 4 + 4 + 6


@pytest.mark.filterwarnings("ignore")
def test_a_smaller_rank_is_the_closest_product(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        adapted("lora", tmp_path / name, seed)
    assert not fedbasin("merge", tmp_path / "a", tmp_path / "b", "--rule", "linear", "-o", tmp_path / "exact").exit_code
    assert not fedbasin(
        "merge", tmp_path / "a", tmp_path / "b", "--rule", "linear", "--rank", 3, "-o", tmp_path / "out"
    ).exit_code
    from safetensors.torch import load_file

    exact, out = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exact", "out"))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    product, cut = (state[key.format("B")] @ state[key.format("A")] for state in (exact, out))
    assert out[key.format("A")].shape[0] == 3
    values = torch.linalg.svdvals(product)
    assert float((product - cut).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_convolutions(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for dora in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1))
        save_file(net.state_dict(), tmp_path / "base.safetensors")
        model = get_peft_model(net, LoraConfig(r=2, lora_alpha=5, target_modules=["0", "1"], use_dora=dora))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        folder = tmp_path / f"a{dora}"
        model.save_pretrained(folder)
        image = torch.randn(1, 3, 8, 8)
        expected = model.eval()(image).detach()
        out = tmp_path / f"{dora}.safetensors"
        assert not fedbasin(
            "merge", f"{tmp_path}/base.safetensors+{folder}", "--rule", "passthrough", "-o", out
        ).exit_code
        from safetensors.torch import load_file

        plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1))
        plain.load_state_dict(load_file(out))
        near(plain(image).detach(), expected, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_added_is_refused_by_name(tmp_path: Path) -> None:
    adapted("lora", tmp_path / "a")
    adapted("dora", tmp_path / "d")
    adapted("lora", tmp_path / "fewer", target_modules=["q_proj"])
    a, d, fewer, out = (tmp_path / name for name in ("a", "d", "fewer", "out"))
    assert "a DoRA and another adapter have no mean" in refusal("merge", a, d, "--rule", "linear", "-o", out)
    assert "only one of them adapts 'model.layers.0.mlp.down_proj'" in refusal(
        "merge", a, fewer, "--rule", "linear", "-o", out
    )
    assert "adapters are added as products by linear" in refusal("merge", a, a, "--rule", "karcher", "-o", out)
    wrong = {
        "r": (8, "gives 'model.layers.0.mlp.down_proj' the rank 8, but its factors have 4"),
        "lora_alpha": (None, "lora_alpha is None, so the scale of"),
        "peft_type": ("IA3", "peft_type is 'IA3'; adapters of LORA and ADALORA can be merged"),
        "init_lora_weights": ("pissa", "changes the base model; save the adapter with path_initial_model"),
        "target_parameters": (["x"], "target_parameters is ['x'], which is not known to be a low-rank product"),
    }
    for key, (value, reason) in wrong.items():
        shutil.copytree(a, tmp_path / key)
        path = tmp_path / key / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        assert reason in refusal("merge", tmp_path / key, "--rule", "linear", "-o", out)
    base_model("lora").save_pretrained(tmp_path / "base")
    assert "is an adapter; write BASE+ADAPTER" in refusal("merge", tmp_path / "base", a, "--rule", "linear", "-o", out)
    assert not out.exists()
