"""Adapters of the real library, on tiny models of several families."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.groups.groups import Group, Orthogonal
from fedbasin.strategies.symmetry.lora_symmetry import adapted, adapters, general
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError, parse
from fedbasin.strategies.symmetry.transform import random
from tests.double_precision import Doubled
from tests.strategies.symmetry.test_groups import drawn
from tests.strategies.symmetry.tiny_transformers import MODELS, symmetry_of

CONFIGS: dict[str, dict[str, Any]] = {
    "bert_classes": {"target_modules": ["query", "value", "dense"]},
    "bert_tokens": {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    "llama": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "qwen3": {"target_modules": ["q_proj", "embed_tokens"]},
    "vit": {"target_modules": ["q_proj", "fc1"], "rank_pattern": {"fc1": 2}},
}
every_model = pytest.mark.parametrize("name", CONFIGS)
every_group = pytest.mark.parametrize("group", [Orthogonal, general], ids=["O", "GL"])


def adapt(name: str, **options: Any) -> tuple[nn.Module, Symmetry]:
    """An adapted model, called with plain tensors, and the symmetry of the one below."""
    tiny = MODELS[name]
    torch.manual_seed(0)
    base = tiny.make().eval()
    symmetry = symmetry_of(base)
    with warnings.catch_warnings():
        # The library asks transformers by a name that is going away.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        config = peft.LoraConfig(r=3, lora_alpha=6, **CONFIGS[name] | options)
        model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.4 * noise if parameter.dim() > 1 else parameter + 0.3 * noise)
    inner = model.forward

    def forward(*tensors: Tensor) -> Any:
        with Doubled():
            return tiny.output(inner(**dict(zip(tiny.inputs, tensors, strict=True))))

    model.forward = forward
    return model, symmetry


def proven(name: str, model: nn.Module, symmetry: Symmetry) -> bool:
    report = check(model, symmetry, *MODELS[name].inputs.values())
    worst = max(trial.double_error for trial in report.trials)
    print(name, worst, report.guilty)
    return report.passed


@every_group
@every_model
def test_the_inner_space_of_an_adapter_is_free(name: str, group: Callable[[int], Group]) -> None:
    model, _ = adapt(name)
    assert proven(name, model, adapters(model.state_dict(), group))


@every_model
def test_adapters_follow_the_layers_that_they_adapt(name: str) -> None:
    model, base = adapt(name)
    transposed = CONFIGS[name].get("fan_in_fan_out", False)
    symmetry = adapted(base, model.state_dict(), fan_in_fan_out=transposed)
    assert len(symmetry.spaces) > len(base.spaces)
    assert parse(str(symmetry)) == symmetry
    assert proven(name, model, symmetry)


def test_an_adapter_left_behind_is_noticed() -> None:
    model, base = adapt("bert_classes")
    symmetry = adapted(base, model.state_dict())
    for part in ("lora_A", "lora_B"):
        spaces = tuple(
            replace(space, axes=tuple(m for m in space.axes if part not in m.tensor))
            for space in symmetry.spaces
            if space.name in {s.name for s in base.spaces}
        )
        assert not proven("bert_classes", model, Symmetry(spaces))


@pytest.mark.parametrize("name", ["gpt2"])
def test_the_wrong_storage_order_is_refused_or_noticed(name: str) -> None:
    model, base = adapt(name)
    symmetry = adapted(base, model.state_dict())
    with pytest.raises(SymmetryError, match="lora_"):
        symmetry.check(model.state_dict())


@every_group
def test_adapters_planted_elsewhere_are_found_again(group: Callable[[int], Group]) -> None:
    model, _ = adapt("bert_classes")
    anchor = {n: t for n, t in model.double().state_dict().items() if "lora_" in n}
    symmetry = adapters(anchor, group)
    client = random(symmetry, drawn(1)).act(anchor)
    found = match_weights(symmetry, anchor, client)
    assert found.report.distance_after < 1e-4 * found.report.distance_before
    assert match_weights(symmetry, anchor, dict(anchor)).transform.is_identity


@every_group
def test_aligned_factors_average_to_nearly_the_average_product(group: Callable[[int], Group]) -> None:
    generator = drawn(2)
    names = ("lora_A.weight", "lora_B.weight")
    shapes = ((4, 20), (15, 4))
    anchor = {
        f"l.{n}": torch.randn(s, generator=generator, dtype=torch.float64) for n, s in zip(names, shapes, strict=True)
    }
    symmetry = adapters(anchor, group)
    close = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in anchor.items()}
    client = random(symmetry, generator).act(close)

    def product(state: Mapping[str, Tensor]) -> Tensor:
        return state["l.lora_B.weight"] @ state["l.lora_A.weight"]

    def error(other: Mapping[str, Tensor]) -> float:
        mean = {n: (anchor[n] + other[n]) / 2 for n in anchor}
        wanted = (product(anchor) + product(other)) / 2
        return float((product(mean) - wanted).norm() / wanted.norm())

    aligned = match_weights(symmetry, anchor, client).state
    assert error(client) > 0.2
    assert error(aligned) < 0.01


def test_a_fresh_adapter_is_only_turned() -> None:
    generator = drawn(3)
    anchor = {"l.lora_A.weight": torch.randn(4, 9, generator=generator), "l.lora_B.weight": torch.zeros(7, 4)}
    client = {**anchor, "l.lora_A.weight": torch.randn(4, 9, generator=generator)}
    symmetry = adapters(anchor, general)
    found = match_weights(symmetry, anchor, client)
    (element,) = found.transform.elements.values()
    assert element.blocks[0] is not None
    assert float(torch.linalg.cond(element.blocks[0]).max()) < 1e3
    assert found.report.distance_after < found.report.distance_before


def test_magnitudes_of_units_follow_them() -> None:
    model, base = adapt("bert_classes", target_modules=["intermediate.dense"], use_dora=True)
    symmetry = adapted(base, model.state_dict())
    assert "lora_magnitude_vector" in str(symmetry)
    assert proven("bert_classes", model, symmetry)
    model, base = adapt("bert_classes", target_modules=["query"], use_dora=True)
    with pytest.raises(SymmetryError, match="lora_magnitude_vector"):
        adapted(base, model.state_dict())


def test_magnitudes_follow_orders_and_refuse_rotations() -> None:
    state = {
        "base_model.model.up.base_layer.weight": torch.zeros(4, 5),
        "base_model.model.up.lora_A.default.weight": torch.zeros(2, 5),
        "base_model.model.up.lora_B.default.weight": torch.zeros(4, 2),
        "base_model.model.up.lora_magnitude_vector.default.weight": torch.zeros(4),
        "base_model.model.down.weight": torch.zeros(3, 4),
    }
    axes = "up.weight[0] down.weight[1]"
    symmetry = adapted(parse(f"m S(4) {axes}"), state)
    symmetry.check(state)
    moved = [m.tensor.rpartition("up.")[2] for m in symmetry.spaces[0].axes]
    assert moved == [
        *("base_layer.weight", "lora_B.default.weight"),
        *("lora_magnitude_vector.default.weight", "base_model.model.down.weight"),
    ]
    with pytest.raises(SymmetryError, match="lora_magnitude_vector"):
        adapted(parse(f"m O(4) {axes}"), state)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(SymmetryError, match="no tensor named lora_A"):
        adapters({"a.weight": torch.zeros(2, 2)})
    with pytest.raises(SymmetryError, match="no partner"):
        adapters({"a.lora_A.weight": torch.zeros(2, 2)})
