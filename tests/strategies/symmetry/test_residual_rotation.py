"""Residual streams rotate once the layers that read their norms, which execution tells, have absorbed the weights."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbasin.strategies.alignment.weight_matching import match_weights
from fedbasin.strategies.symmetry.check import check
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.discover.rotation import rotate_residual
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry, SymmetryError, parse
from fedbasin.strategies.symmetry.transform import random
from fedbasin.strategies.tensors.state import distance
from tests.strategies.symmetry.by_hand.residual_rotation import rotating_residual_family, rotating_residual_transformer
from tests.strategies.symmetry.families import Transformer
from tests.strategies.symmetry.tiny_transformers import MODELS, ROTARY, TEXT, TOKENS, Tiny, hf, text, untied

IMAGES = torch.zeros(2, 8, 8)
GPT2 = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16, "vocab_size": 31}
BY_HAND: dict[str, Tiny] = {
    "gpt2_untied": text(hf.GPT2LMHeadModel, hf.GPT2Config, **untied(**GPT2)),
    **{
        name: MODELS[name]
        for name in (
            *("gpt2_untied_classes", "gpt_neox", "gpt_neox_sequential", "vit", "mistral"),
            *("llama", "llama_biases", "llama_classes", "llama_one_key", "mixtral"),
            *("qwen2", "qwen3", "qwen3_biases"),
        )
    },
}
# One of each kind of norm, projection and unit; all others have `slow`.
SAMPLE = ("gpt2_untied", "gpt_neox", "vit", "mixtral")


def rotated(model: nn.Module, *inputs: Tensor) -> Symmetry:
    return rotate_residual(model, discover(model, *inputs).symmetry, *inputs)


def streams(symmetry: Symmetry) -> list[Space]:
    return [space for space in symmetry.spaces if str(space.group)[0] in "CO" and "wr" not in str(space.group)]


def small(*, bias: bool = True, width: int = 16) -> Transformer:
    torch.manual_seed(0)
    return Transformer(width=width, heads=4, bias=bias)


@cache
def rotated_small() -> Symmetry:
    return rotated(small(), IMAGES)


def shaken(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A state with gains and biases that are not the fresh ones."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor.detach() + 0.3 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in model.state_dict().items()
    }


def assert_at_least(symmetry: Symmetry, by_hand: Symmetry) -> None:
    """The stream by hand is rotated by the same group, and the same layers absorb the same norms."""
    (oracle,) = streams(by_hand)
    tensors = {(axis.tensor, axis.dim) for axis in oracle.axes}
    (stream,) = (s for s in streams(symmetry) if tensors <= {(axis.tensor, axis.dim) for axis in s.axes})
    assert stream.group == oracle.group
    readers = {fold.norm: set(fold.readers) for fold in symmetry.folds}
    assert {fold.norm: set(fold.readers) for fold in by_hand.folds}.items() <= readers.items()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow) for n in BY_HAND])
def test_what_was_written_by_hand_is_found_by_execution(name: str) -> None:
    model, inputs = BY_HAND[name].model(), tuple(BY_HAND[name].inputs.values())
    symmetry = rotated(model, *inputs)
    config: Any = model.config
    assert_at_least(symmetry, rotating_residual_family(config.model_type, config, model.state_dict()))
    report = check(model, symmetry, *inputs, trials=2)
    assert report.passed, report
    assert parse(str(symmetry)) == symmetry


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_transformer_is_rotated_as_by_hand(bias: bool) -> None:
    model = small(bias=bias)
    symmetry = rotated(model, IMAGES)
    assert_at_least(symmetry, rotating_residual_transformer(model.state_dict(), 4))
    assert check(model, symmetry, IMAGES).passed


def t5_of_two_tables() -> nn.Module:
    sizes = {"d_model": 12, "d_kv": 4, "d_ff": 10, "num_layers": 2, "num_heads": 3, "vocab_size": 31}
    config = hf.UMT5Config(**sizes)
    # The constructor overrides what it is told.
    config.tie_word_embeddings = False
    return hf.UMT5ForConditionalGeneration(config)


OPT = {**TEXT, "word_embed_proj_dim": 12, "ffn_dim": 10}
FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31}
LATENT = {
    **ROTARY,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "first_k_dense_replace": 1,
    "experts_implementation": "eager",
}
# Nobody wrote these by hand: groups of the streams, in any order.
BEYOND: dict[str, tuple[Tiny, list[str]]] = {
    "clip": (MODELS["clip"], ["C(12)"]),
    "opt": (text(hf.OPTForCausalLM, hf.OPTConfig, **untied(**OPT)), ["C(12)"]),
    "falcon": (text(hf.FalconForCausalLM, hf.FalconConfig, **untied(**FALCON)), ["C(16)"]),
    "two stacks": (
        Tiny(
            t5_of_two_tables,
            {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "decoder_input_ids": TOKENS[:, :4]},
        ),
        ["O(12)", "O(12)"],
    ),
    "latent": (text(hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, **untied(**LATENT)), ["O(12)"] * 4 + ["O(16)"]),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "clip" else pytest.mark.slow) for n in BEYOND])
def test_streams_that_nobody_wrote_down_rotate(name: str) -> None:
    tiny, groups = BEYOND[name]
    model, inputs = tiny.model(), tuple(tiny.inputs.values())
    symmetry = rotated(model, *inputs)
    assert sorted(str(space.group) for space in streams(symmetry)) == sorted(groups)
    report = check(model, symmetry, *inputs, trials=2)
    assert report.passed, report


class Blocks(nn.Module):
    """Linear blocks around a stream, with options that decide if it rotates and how."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        *,
        bias: bool = True,
        after: bool = False,
        last: bool = True,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.norms = nn.ModuleList(norm(8) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(8, 6, bias=bias) for _ in range(2))
        self.besides = nn.ModuleList(nn.Linear(8, 6, bias=bias) for _ in range(2)) if parallel else None
        self.downs = nn.ModuleList(nn.Linear(6, 8, bias=bias) for _ in range(2))
        self.after = nn.ModuleList(norm(8) for _ in range(2)) if after else [nn.Identity()] * 2
        self.last = norm(8) if last else nn.Identity()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, (norm, up, down, after) in enumerate(
            zip(self.norms, self.ups, self.downs, self.after, strict=True)
        ):
            y = norm(x)
            units = torch.relu(up(y)) if self.besides is None else torch.relu(up(y)) * self.besides[number](y)
            x = x + after(down(units))
        return self.head(self.last(x))


ROWS = torch.zeros(4, 5)
WAYS = {
    "a mean": (lambda: Blocks(), "C(8)"),
    "no mean": (lambda: Blocks(nn.RMSNorm), "O(8)"),
    "no biases": (lambda: Blocks(bias=False), "C(8)"),
    "two readers": (lambda: Blocks(nn.RMSNorm, parallel=True), "O(8)"),
    "no last norm": (lambda: Blocks(nn.RMSNorm, last=False), "O(8)"),
}


@pytest.mark.parametrize("name", WAYS)
def test_norms_decide_the_group(name: str) -> None:
    make, group = WAYS[name]
    torch.manual_seed(0)
    model = make()
    symmetry = rotated(model, ROWS)
    assert [str(space.group) for space in streams(symmetry)] == [group]
    assert len(symmetry.folds) == sum(1 for tensor in model.state_dict() if "norms" in tensor or "last" in tensor) // (
        2 if group == "C(8)" else 1
    )
    assert check(model, symmetry, ROWS).passed


class Scaled(nn.Module):
    """A norm that holds its weight less one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def unread() -> nn.Module:
    """A block whose first layer has no effect on the outputs."""
    model = Blocks(parallel=True)
    model.besides[0].register_forward_hook(lambda layer, inputs, output: 0 * output + 1)
    return model


REFUSED = {
    "a norm after the branch": (
        lambda: Blocks(after=True),
        r"'after\.0\.weight' scales single entries of the stream 'first'",
    ),
    "weights less one": (lambda: Blocks(Scaled), r"'norms\.0\.weight' scales single entries"),
    "a reader without effect": (unread, r"'norms\.0\.weight' scales single entries"),
    "no weights": (lambda: Blocks(lambda n: nn.LayerNorm(n, elementwise_affine=False)), "no norm has a weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_stream_that_cannot_rotate_is_refused_with_what_prevents_it(name: str) -> None:
    make, message = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(SymmetryError, match=message):
        rotated(make(), ROWS)


@pytest.mark.parametrize(("name", "tensor"), [("gpt2", "ln_f.weight"), ("bert", "embeddings.LayerNorm.weight")])
def test_a_tied_head_and_a_norm_after_the_sum_are_refused_with_the_remedy(name: str, tensor: str) -> None:
    with pytest.raises(SymmetryError, match=rf"{tensor}' scales .*tie_word_embeddings = False"):
        rotated(MODELS[name].model(), TOKENS)


def test_a_model_without_a_head_hands_its_stream_out() -> None:
    model = small()
    model.head = nn.Identity()
    with pytest.raises(SymmetryError, match="a model without a head returns its stream"):
        rotated(model, IMAGES)


def test_the_mean_may_not_change_under_a_layer_norm() -> None:
    text = str(rotated_small()).replace("C(16)", "O(16)")
    assert check(small(), parse(text), IMAGES).guilty == ("embedding",)


def test_without_folding_a_rotation_changes_the_function() -> None:
    unfolded = Symmetry(rotated_small().spaces)
    assert "embedding" in check(small(), unfolded, IMAGES).guilty


def test_a_planted_rotation_is_undone() -> None:
    model, symmetry = small(), rotated_small()
    state = shaken(model)
    planted = random(symmetry, torch.Generator().manual_seed(3)).act(symmetry.fold(state))
    found = match_weights(symmetry, state, planted)
    assert distance(symmetry.fold(state), found.state) < 1e-3 * distance(state, planted)


def test_matching_folds_both_and_keeps_the_function() -> None:
    model, symmetry = small(), rotated_small()
    anchor, client = shaken(model, 1), shaken(model, 2)
    found = match_weights(symmetry, anchor, client)
    images = torch.randn(5, 8, 8)
    before, after = (functional_call(model, s, (images,)) for s in (client, found.state))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    for fold in symmetry.folds:
        torch.testing.assert_close(found.state[fold.weight], torch.ones(16), rtol=0, atol=0)
    again = match_weights(symmetry, anchor, found.state)
    torch.testing.assert_close(again.state, found.state, atol=1e-3, rtol=1e-3)
