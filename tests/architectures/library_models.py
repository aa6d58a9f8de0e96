"""Tiny models of the `transformers` library with what they are executed on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedbasin.server.files.library.library_inputs import example_inputs
from tests.architectures.library_configs import tiny_config
from tests.architectures.proof import Verdict, examine
from tests.strategies.symmetry.tiny_transformers import hf

# Outputs that are no answers of a model with a head: what its layers pass on to each other.
_INTERNAL = (
    "hidden_state",
    "past_key_values",
    "attentions",
    "pooler_output",
    "extract_features",
    "cache_params",
    "mems",
)


def build(model_type: str, architecture: str) -> nn.Module:
    """Return a tiny model whose random parameters are the same every time, in evaluation mode."""
    torch.manual_seed(0)
    return random_model(model_type, architecture)


def random_model(model_type: str, architecture: str) -> nn.Module:
    """Return a tiny model with random parameters, in evaluation mode."""
    config = tiny_config(model_type)
    # The product of all experts at once has no float64.
    config._experts_implementation = "eager"
    return getattr(hf, architecture)(config).eval()


def examine_architecture(model_type: str, architecture: str) -> Verdict:
    """Discover the symmetry of a tiny model, and execute the model under random elements of it."""
    model = build(model_type, architecture)
    example = example_inputs(model)
    others = [_redrawn(example), *([_masked(example)] if "input_ids" in example else [])]
    has_head = "For" in architecture or "Head" in architecture or "MTModel" in architecture
    name = f"{model_type} {architecture}"
    return examine(name, model, example, others, answers_of_heads if has_head else answers_of_bases)


def answers_of_heads(output: Any) -> Any:
    """Return what a model with a head answers; its hidden states may move."""
    values = {name: value for name, value in output.items() if not any(part in name for part in _INTERNAL)}
    return values or answers_of_bases(output)


def answers_of_bases(output: Any) -> Any:
    """Return what a model without a head answers: its states, or its embeddings where it projects them."""
    projected = {name: value for name, value in output.items() if "logits" in name or name.endswith("_embeds")}
    states = {name: value for name, value in output.items() if name in ("last_hidden_state", "pooler_output")}
    maps = {name: value for name, value in output.items() if name == "feature_maps"}
    return projected or states or maps or {name: value for name, value in output.items() if isinstance(value, Tensor)}


def _redrawn(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return other inputs of the same shapes."""
    generator = torch.Generator().manual_seed(1)

    def redraw(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator)
        order = torch.randperm(tensor.numel(), generator=generator)
        return tensor.flatten()[order].view(tensor.shape)

    return {name: tensor if name == "bbox" else redraw(tensor) for name, tensor in example.items()}


def _masked(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a shorter text in a batch of one more, with padding."""
    inputs = {}
    for name, tensor in example.items():
        batch = torch.cat([tensor, tensor[:1].flip(-1) if name == "input_ids" else tensor[:1]])
        inputs[name] = batch[..., :6] if name == "input_ids" else batch[:, :6] if name == "bbox" else batch
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, ..., 4:] = 0
    return inputs
