"""What only looks like a symmetry of an architecture is noticed by execution."""

import pytest

from fedbasin.strategies.symmetry.check import CheckReport, check
from fedbasin.strategies.symmetry.symmetry import Space, Symmetry, parse
from tests.strategies.symmetry.tiny_transformers import MODELS, symmetry_of


def reported(name: str, *spaces: Space) -> CheckReport:
    model = MODELS[name].model()
    return check(model, Symmetry(spaces), *MODELS[name].inputs.values())


def space_of(name: str, space: str) -> Space:
    return next(s for s in symmetry_of(MODELS[name].model()).spaces if s.name == space)


LLAMA = "model.layers.0.self_attn"
GPT = "transformer.h.0"
REPLACED = {
    "any rotation under rotary positions": ("llama", "heads.0", "R(4,2)", "O(4)"),
    "the interleaved layout in a half-split model": ("llama", "heads.0", "R(4,2)", "R(4,1)"),
    "rotary positions on the whole head": ("gpt_neox", "heads.0", "R(4,2)+O(4)", "R(8,4)"),
    "any rotation of a head turned in part": ("gpt_neox", "heads.0", "R(4,2)+O(4)", "O(8)"),
    "rotary turns under a norm of queries": ("qwen3", "heads.0", "Z(6,3)", "R(6,3)"),
    "signs in a stream with means": ("gpt2", "residual", "S(12)", "O(1) wr S(12)"),
    "signs in a GELU": ("gpt2", "mlp.0", "S(48)", "O(1) wr S(48)"),
    "a rotation in a ReLU": ("t5", "encoder.mlp.0", "S(10)", "O(10)"),
    "a rotation of a normed stream": ("bert", "residual", "S(12)", "O(12)"),
    "channels that cross from head to head": ("vit", "heads.0", "O(4)*O(4) wr S(3)", "O(12)*O(12) wr S(1)"),
    "a rotation across positions' heads": ("deberta_v2", "heads.0", "O(4)*O(4) wr S(3)", "O(12)*O(12) wr S(1)"),
}


@pytest.mark.parametrize("case", REPLACED)
def test_a_larger_group_fails(case: str) -> None:
    name, space, right, wrong = REPLACED[case]
    found = str(space_of(name, space))
    assert f" {right} " in found or f"({right}*" in found or f" {right}*" in found
    larger = parse(found.replace(right, wrong)).spaces
    assert not reported(name, *larger).passed


WRITTEN = {
    "keys shared by the wrong queries": (
        "llama",
        f"h (R(4,2))xS(2) wr S(2) {LLAMA}.k_proj.weight[0] {LLAMA}.q_proj.weight[0]@1",
    ),
    "queries exchanged across key groups": ("llama", f"h S(4) {LLAMA}.q_proj.weight[0] {LLAMA}.o_proj.weight[1]"),
    "queries turned, keys not": ("gpt2", f"h O(4)^3 {GPT}.attn.c_attn.weight[1,0:12]"),
    "fused thirds read as interleaved": (
        "gpt2",
        f"h O(4)^3 {GPT}.attn.c_attn.weight[1,0:4/12] {GPT}.attn.c_attn.weight[1,4:8/12]",
    ),
    "interleaved heads read as thirds": (
        "gpt_neox",
        "h O(8)^3 gpt_neox.layers.0.attention.query_key_value.weight[0,48:72] "
        "gpt_neox.layers.0.attention.dense.weight[1]",
    ),
    "signs on the gate": (
        "llama",
        "m O(1) wr S(10) model.layers.0.mlp.gate_proj.weight[0] model.layers.0.mlp.up_proj.weight[0] "
        "model.layers.0.mlp.down_proj.weight[1]",
    ),
    "experts without their router": (
        "mixtral",
        "e S(3) model.layers.0.mlp.experts.gate_up_proj[0] model.layers.0.mlp.experts.down_proj[0]",
    ),
    "units exchanged across experts": (
        "mixtral",
        "e S(30) model.layers.0.mlp.experts.gate_up_proj[0.1,0:10] model.layers.0.mlp.experts.down_proj[0.2]",
    ),
    "the words": ("gpt2", "w S(31) transformer.wte.weight[0] lm_head.weight[0]"),
    "a table without the head that is tied to it": ("gpt2", "r S(12) transformer.wte.weight[1]"),
    "the space where two towers meet": ("clip", "p O(7) text_projection.weight[0] visual_projection.weight[0]"),
    "classes": ("vit", "c S(5) classifier.weight[0] classifier.bias[0]"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_not_a_symmetry_fails(case: str) -> None:
    name, line = WRITTEN[case]
    report = reported(name, *parse(line).spaces)
    assert not report.passed
    assert all(trial.double_error > 1e-4 for trial in report.trials)


def test_heads_of_one_block_alone_fail_under_shared_position_biases() -> None:
    stack = "encoder.block.0.layer.0.SelfAttention"
    turned = "O(4)*O(4) wr S(3)"
    axes = f"{stack}.q.weight[0] {stack}.k.weight[0] {stack}.v.weight[0]@1 {stack}.o.weight[1]@1"
    assert not reported("t5", *parse(f"alone {turned} {axes}").spaces).passed
    fixed = turned.replace(" wr S(3)", "").split("*")[0] + "^3"
    in_place = f"qk {fixed} {stack}.q.weight[0] {stack}.k.weight[0]"
    assert reported("t5", *parse(in_place).spaces).passed


def test_the_columns_of_the_biases_belong_to_the_heads() -> None:
    whole = str(space_of("t5", "encoder.heads"))
    table = " encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight[1]@4"
    assert table in whole
    without = whole.replace(table, "").replace("*S(1)", "")
    assert not reported("t5", *parse(without).spaces).passed


def test_projections_of_positions_belong_to_the_heads() -> None:
    found = space_of("deberta_v2", "heads.0")
    content = tuple(axis for axis in found.axes if ".pos_" not in axis.tensor)
    assert len(content) == len(found.axes) - 4
    assert not reported("deberta_v2", Space(found.name, found.group, content)).passed
