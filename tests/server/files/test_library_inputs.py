"""Inputs that a model may be given too: what reads them moves with the rest, because the example has them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedbasin.server.files.library.library_inputs import example_inputs
from fedbasin.strategies.symmetry.discover.discovery import discover
from tests.architectures.library_models import answers_of_heads, build
from tests.architectures.proof import largest_change
from tests.strategies.symmetry.tiny_transformers import TEXT, hf


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


@pytest.mark.parametrize(("reading", "width"), [({}, 12), ({"encoder_hidden_size": 20}, 20)])
def test_a_decoder_is_given_the_states_of_an_encoder_that_is_no_part_of_it(reading: dict[str, int], width: int) -> None:
    config = hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True, **reading)
    assert example_inputs(hf.BertLMHeadModel(config))["encoder_hidden_states"].shape == (2, 8, width)


def test_a_model_that_reads_no_encoder_and_no_segments_is_not_given_any() -> None:
    assert set(example_inputs(hf.BertForMaskedLM(hf.BertConfig(**TEXT)))) == {"input_ids"}
