from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.groups.centred import Centred
from fedbasin.strategies.symmetry.groups.groups import Orthogonal
from fedbasin.strategies.symmetry.models.prenorm_transformer import Names, preln_transformer
from fedbasin.strategies.symmetry.models.residual_rotation import (
    rotate_residual,
    rotating_residual_family,
    rotating_residual_transformer,
)
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError, parse
from fedbasin.strategies.symmetry.transform import random
from fedbasin.strategies.tensors.state import distance
from tests.strategies.symmetry.families import Transformer
from tests.strategies.symmetry.tiny_transformers import MODELS, Tiny, hf, text

IMAGES = torch.zeros(2, 8, 8)
UNTIED = {"vocab_size": 31, "tie_word_embeddings": False}
GPT2 = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16, **UNTIED}
ROTATING: dict[str, Tiny] = {
    "gpt2_untied": text(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT2),
    **{
        name: MODELS[name]
        for name in (
            *("gpt2_untied_classes", "gpt_neox", "gpt_neox_sequential", "vit", "mistral"),
            *("llama", "llama_biases", "llama_classes", "llama_one_key", "mixtral"),
            *("qwen2", "qwen3", "qwen3_biases"),
        )
    },
}


def symmetry_of(model: nn.Module) -> Symmetry:
    config: Any = model.config
    return rotating_residual_family(config.model_type, config, model.state_dict())


def small(*, bias: bool = True) -> Transformer:
    torch.manual_seed(0)
    return Transformer(width=16, heads=4, bias=bias)


def shaken(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A state with gains and biases that are not the fresh ones."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor.detach() + 0.3 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("name", ROTATING)
def test_the_function_is_left_as_it_was(name: str) -> None:
    tiny = ROTATING[name]
    model = tiny.model()
    symmetry = symmetry_of(model)
    report = check(model, symmetry, *tiny.inputs.values(), trials=2)
    assert report.passed, report
    assert parse(str(symmetry)) == symmetry


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_transformer_keeps_its_function_with_and_without_biases(bias: bool) -> None:
    model = small(bias=bias)
    report = check(model, rotating_residual_transformer(model.state_dict(), 4), IMAGES)
    assert report.passed, report


@pytest.mark.parametrize(
    ("name", "group"), [("gpt_neox", Centred), ("vit", Centred), ("llama", Orthogonal), ("qwen2", Orthogonal)]
)
def test_a_layer_norm_keeps_the_mean_and_a_root_mean_square_norm_nothing(name: str, group: type) -> None:
    stream = symmetry_of(ROTATING[name].model()).spaces[0]
    assert stream.name == "residual"
    assert isinstance(stream.group, group)


def test_the_mean_may_not_change_under_a_layer_norm() -> None:
    model = small()
    symmetry = rotating_residual_transformer(model.state_dict(), 4)
    text = str(symmetry).replace("C(16)", "O(16)")
    assert check(model, parse(text), IMAGES).guilty == ("residual",)


def test_without_folding_a_rotation_changes_the_function() -> None:
    model = small()
    symmetry = rotating_residual_transformer(model.state_dict(), 4)
    unfolded = Symmetry(symmetry.spaces)
    assert "residual" in check(model, unfolded, IMAGES).guilty


def test_a_gain_that_is_forgotten_is_refused_by_name() -> None:
    state = small().state_dict()
    whole = rotating_residual_transformer(state, 4)
    with pytest.raises(SymmetryError, match=r"final_norm\.weight scales entries of the residual stream"):
        rotate_residual(preln_transformer(state, 4), whole.folds[:-1], state)


def test_a_planted_rotation_is_undone() -> None:
    model = small()
    symmetry = rotating_residual_transformer(model.state_dict(), 4)
    state = shaken(model)
    planted = random(symmetry, torch.Generator().manual_seed(3)).act(symmetry.fold(state))
    found = match_weights(symmetry, state, planted)
    assert distance(symmetry.fold(state), found.state) < 1e-3 * distance(state, planted)


def test_matching_folds_both_and_keeps_the_function() -> None:
    model = small()
    symmetry = rotating_residual_transformer(model.state_dict(), 4)
    anchor, client = shaken(model, 1), shaken(model, 2)
    found = match_weights(symmetry, anchor, client)
    images = torch.randn(5, 8, 8)
    before, after = (functional_call(model, s, (images,)) for s in (client, found.state))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    for fold in symmetry.folds:
        torch.testing.assert_close(found.state[fold.weight], torch.ones(16), rtol=0, atol=0)
    again = match_weights(symmetry, anchor, found.state)
    torch.testing.assert_close(again.state, found.state, atol=1e-3, rtol=1e-3)


def test_a_tied_head_is_refused_with_the_remedy() -> None:
    with pytest.raises(SymmetryError, match=r"are one tensor.*tie_word_embeddings = False"):
        symmetry_of(MODELS["gpt2"].model())


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_an_architecture_whose_stream_cannot_rotate_is_refused(name: str) -> None:
    with pytest.raises(SymmetryError, match="no rotating residual stream for"):
        symmetry_of(MODELS[name].model())


def test_a_model_without_a_head_hands_its_stream_out() -> None:
    state = small().state_dict()
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    with pytest.raises(SymmetryError, match="returns its residual stream"):
        rotating_residual_transformer(bare, 4, Names(head=None))
    with pytest.raises(SymmetryError, match="no space 'residual'"):
        rotate_residual(preln_transformer(state, 4, residual=False), (), state)
