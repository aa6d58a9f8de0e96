"""Inputs that a model may be given too: what reads them moves with the rest, because the example has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedbasin.server.files.library.library_inputs import example_inputs
from fedbasin.strategies.symmetry.discover.discovery import discover
from tests.architectures.library_models import answers_of_heads, build
from tests.architectures.proof import largest_change
from tests.server.files.stored import answer, refusal
from tests.strategies.symmetry.tiny_transformers import ROTARY, TEXT, VISION, hf


def segments(tokens: Tensor) -> Tensor:
    return (torch.arange(tokens.shape[-1]) > 3).long().expand_as(tokens)


def first_and_third(tokens: Tensor) -> Tensor:
    return torch.zeros_like(tokens).index_fill(-1, torch.tensor([0, 2]), 1)


def states(tokens: Tensor) -> Tensor:
    return torch.randn(len(tokens), 5, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("kind", "architecture", "name", "draw"),
    [
        # The tokenizer of XLNet gives segments, and a summary by LED is written with global attention.
        ("xlnet", "XLNetForSequenceClassification", "token_type_ids", segments),
        ("longformer", "LongformerForTokenClassification", "global_attention_mask", first_and_third),
        pytest.param(
            *("led", "LEDForConditionalGeneration", "global_attention_mask", first_and_third), marks=pytest.mark.slow
        ),
        ("whisper", "WhisperForCausalLM", "encoder_outputs", states),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_function_is_kept_on_optional_inputs(
    kind: str, architecture: str, name: str, draw: Callable[[Tensor], Tensor]
) -> None:
    model = build(kind, architecture)
    example = example_inputs(model)
    symmetry = discover(model, example).symmetry
    other = {**example, name: draw(example["input_ids"])}
    assert not torch.equal(other[name], example[name])
    assert largest_change(model, symmetry, [other], answers_of_heads) < 1e-10


def language_and_vision(kind: str, **options: Any) -> Any:
    """Return a model of images and texts whose widths differ, because equal ones say nothing of what touches what."""
    text = {**ROTARY, "vocab_size": 40}
    return getattr(hf, f"{kind}ForConditionalGeneration")(
        getattr(hf, f"{kind}Config")(**{"text_config": text, "image_token_id": 39, **options})
    ).eval()


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_reads_images_as_tokens_is_given_images() -> None:
    torch.manual_seed(0)
    options = {"vision_config": hf.CLIPVisionConfig(**VISION), "vision_feature_layer": -1}
    model = language_and_vision("Llava", **options, text_config=hf.LlamaConfig(**{**ROTARY, "vocab_size": 40}))
    example = example_inputs(model)
    assert (example["input_ids"] == 39).sum(1).tolist() == [4, 4]
    symmetry = discover(model, example).symmetry
    assert any("vision_tower" in space.name for space in symmetry.spaces)
    other = {**example, "pixel_values": example["pixel_values"].flip(0, 3) + 1}
    assert largest_change(model, symmetry, [other], lambda output: output["logits"]) < 1e-10


def patches_and_text(folder: Path, **options: int) -> Path:
    """Save a model that takes patches of images, which no example here has."""
    vision = {"depth": 1, "embed_dim": 20, "hidden_size": 16, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
    angles = {"rope_type": "default", "mrope_section": [1, 0, 1], "rope_theta": 1e4}
    text = {**ROTARY, "vocab_size": 40, "rope_parameters": angles, **options}
    language_and_vision("Qwen2VL", vision_config=vision, text_config=text).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_spaces_that_a_layer_may_touch_which_does_not_run_stay(tmp_path: Path) -> None:
    (report,) = answer("inspect", patches_and_text(tmp_path / "model"))
    assert report["spaces"]
    # The tower writes into the stream, whose units no example shows to move with it.
    assert {space["width"] for space in report["spaces"]} == {ROTARY["intermediate_size"]}
    said = "which the example of the inputs does not run, may touch the units of 'model.language_model.embed_tokens'"
    assert any(said in stop for stop in report["stops"])


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_which_nothing_moves_is_shown_with_the_reasons(tmp_path: Path) -> None:
    model = patches_and_text(tmp_path / "model", intermediate_size=16)
    (report,) = answer("inspect", model)
    assert report["spaces"] == []
    assert report["stops"]
    assert "the symmetry has none, for which `fedbasin inspect` has reasons" in refusal("check", model)


@pytest.mark.parametrize(("reading", "width"), [({}, 12), ({"encoder_hidden_size": 20}, 20)])
def test_a_decoder_is_given_the_states_of_an_encoder_that_is_no_part_of_it(reading: dict[str, int], width: int) -> None:
    config = hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True, **reading)
    assert example_inputs(hf.BertLMHeadModel(config))["encoder_hidden_states"].shape == (2, 8, width)


def test_a_model_that_reads_no_encoder_and_no_segments_is_not_given_any() -> None:
    assert set(example_inputs(hf.BertForMaskedLM(hf.BertConfig(**TEXT)))) == {"input_ids"}
