"""Discovery of a tiny model and of models of 12 layers: seconds, seconds from the cache, peak memory."""

import json
import sys
import time

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from fedbasin.strategies.symmetry.discover.discovery import discover
from tests.benchmarks.figures import Figure, Goal, Say, in_fresh_process, peak_resident_bytes

MODELS = ("tiny BERT", "BERT-base", "GPT-2", "Llama of 12 layers", "ViT-base")
GOALS = {"tiny BERT": 5.0, "BERT-base": 60.0, "GPT-2": 60.0, "Llama of 12 layers": 60.0, "ViT-base": 60.0}
CACHED = 1.0
TOKENS = 8

HOW = f"""Random weights and a batch of two texts of {TOKENS} tokens, or of two images, a fresh process for each model, one
thread. Discovery follows the model in both modes and proves every group in float64. Cached: the same model once more,
with the notation at hand. The peak is that of the process less what it held with the model and before discovery."""


def measure(say: Say) -> Figure:
    rows, goals = [], []
    for name in MODELS:
        say(f"discovery: {name}")
        seen = in_fresh_process("bench_discovery", name)
        first, again, peak = seen["seconds"], seen["cached"], seen["peak"]
        rows.append(
            (
                name,
                f"{seen['parameters'] / 1e6:.1f}",
                f"{first:.1f}",
                f"{again:.2f}",
                f"{peak / 1e9:.2f}",
                seen["share"],
            )
        )
        goals += [
            Goal(f"{name}: below {GOALS[name]:g} s", f"{first:.1f} s", first < GOALS[name]),
            Goal(f"{name}: cached below {CACHED:g} s", f"{again:.2f} s", again < CACHED),
        ]
    columns = ("model", "parameters, million", "discovery, s", "cached, s", "memory, GB", "coverage")
    return Figure("Discovery of symmetries", HOW, columns, rows, goals)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "tiny BERT":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return BertForMaskedLM(BertConfig(vocab_size=64, **sizes)).eval()
    if name == "BERT-base":
        return BertForMaskedLM(BertConfig()).eval()
    if name == "GPT-2":
        return GPT2LMHeadModel(GPT2Config(use_cache=False)).eval()
    if name == "ViT-base":
        return ViTForImageClassification(ViTConfig()).eval()
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=4, use_cache=False, **sizes)).eval()


def worker(name: str) -> dict[str, object]:
    torch.set_num_threads(1)
    model = build(name)
    inputs = {"input_ids": torch.arange(2 * TOKENS).reshape(2, TOKENS) + 3}
    if name == "ViT-base":
        inputs = {"pixel_values": torch.randn(2, 3, 224, 224)}
    cache: dict[str, str] = {}
    before = peak_resident_bytes()
    start = time.perf_counter()
    discovery = discover(model, inputs, cache=cache)
    middle = time.perf_counter()
    discover(model, inputs, cache=cache)
    return {
        "seconds": middle - start,
        "cached": time.perf_counter() - middle,
        "peak": peak_resident_bytes() - before,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "share": f"{discovery.coverage.fraction:.3f}",
    }


if __name__ == "__main__":
    print(json.dumps(worker(sys.argv[1])))
