from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedbasin.strategies.symmetry.check import DOUBLE_TOLERANCE, check
from fedbasin.strategies.symmetry.groups.element import Element
from fedbasin.strategies.symmetry.models.families import FAMILIES, family
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError, parse
from fedbasin.strategies.symmetry.transform import Transform, random
from tests.strategies.symmetry.tiny_transformers import MODELS, hf, symmetry_of

every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, Symmetry, tuple[Tensor, ...]]:
    model = MODELS[name].model()
    return model, symmetry_of(model), tuple(MODELS[name].inputs.values())


@every_model
def test_the_function_is_left_as_it_was(name: str) -> None:
    model, symmetry, inputs = made(name)
    report = check(model, symmetry, *inputs)
    assert report.passed, report


def change(model: nn.Module, inputs: tuple[Tensor, ...], state: Mapping[str, Tensor]) -> float:
    """How far another state takes the outputs, in double."""
    with torch.no_grad():
        own, other = (
            functional_call(model, dict(tensors), inputs, tie_weights=False) for tensors in (model.state_dict(), state)
        )
    pairs = zip(own, other, strict=True) if isinstance(own, tuple) else [(own, other)]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def doubled(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def displacing(symmetry: Symmetry) -> Transform:
    """A random transform that leaves no space's units all in their places."""
    drawn = (random(symmetry, torch.Generator().manual_seed(seed)) for seed in range(1000))
    return next(g for g in drawn if all(moves(element) for element in g.elements.values()))


def moves(element: Element) -> bool:
    home = torch.arange(len(element.order))
    return len(home) == 1 or not torch.equal(element.order, home)


@every_model
def test_only_what_says_nothing_may_be_left_behind(name: str) -> None:
    model, symmetry, inputs = made(name)
    state, inputs = model.double().state_dict(), doubled(inputs)
    transform = displacing(symmetry)
    assert change(model, inputs, transform.act(state)) < DOUBLE_TOLERANCE
    silent, gauges = set(), set()
    for space in symmetry.spaces:
        for axis in space.axes:
            others = tuple(m for m in space.axes if m != axis)
            alone = Symmetry((replace(space, axes=others),))
            moved = Transform(alone, {space.name: transform.elements[space.name]}).act(state)
            if change(model, inputs, moved) < 1e-6:
                silent.add(axis.tensor)
            if not axis.scored and not is_tied_head(axis.tensor):
                gauges.add(axis.tensor)
    # Called without ties, T5 reads its stacks' names of the shared table.
    assert silent - {"shared.weight"} == gauges


def is_tied_head(tensor: str) -> bool:
    """A dense layer in front of a decoder that is the token table: quadratic, so it does not count."""
    return tensor.endswith(("transform.dense.weight", "lm_head.dense.weight")) or (tensor == "vocab_transform.weight")


@every_model
def test_every_tensor_is_moved_or_known_to_stay(name: str) -> None:
    model, symmetry, _ = made(name)
    moved = {axis.tensor for space in symmetry.spaces for axis in space.axes}
    staying = set(model.state_dict()) - moved
    assert all(tensor.endswith(("bias", "logit_scale", "q_norm.weight", "k_norm.weight")) for tensor in staying), (
        staying
    )


@every_model
def test_the_notation_holds_all_of_it_and_a_plain_mapping_is_config_enough(name: str) -> None:
    model, symmetry, _ = made(name)
    assert parse(str(symmetry)) == symmetry
    config: Any = model.config
    assert family(config.model_type, config.to_dict(), model.state_dict()) == symmetry


@every_model
def test_no_space_makes_matching_quadratic(name: str) -> None:
    _, symmetry, _ = made(name)
    assert not [space.name for space in symmetry.spaces if space.quadratic]


def test_every_family_is_proven() -> None:
    types = {MODELS[name].make().config.model_type for name in MODELS}  # type: ignore[union-attr]
    assert types == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("gpt2", {"transformer.wte.weight", "lm_head.weight"}),
        ("bert", {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}),
        ("qwen2_tied", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("t5", {"shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"}),
    ],
)
def test_all_names_of_a_tied_table_move_alike(name: str, tables: set[str]) -> None:
    model, symmetry, _ = made(name)
    state = model.state_dict()
    assert len({state[table].data_ptr() for table in tables}) == 1
    moved = random(symmetry, torch.Generator().manual_seed(0)).act(state)
    first, *others = (moved[table] for table in tables)
    assert not torch.equal(first, state[next(iter(tables))])
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (hf.BertModel, hf.BertConfig),
        (hf.RobertaModel, hf.RobertaConfig),
        (hf.DebertaV2Model, hf.DebertaV2Config),
        (hf.LlamaModel, hf.LlamaConfig),
        (hf.ViTModel, hf.ViTConfig),
    ],
)
def test_a_model_without_a_head_hands_its_stream_out(model: Any, config: Any) -> None:
    sizes = {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 3}
    bare = model(config(**sizes, vocab_size=31, max_position_embeddings=16)).eval()
    names = [space.name for space in symmetry_of(bare).spaces]
    assert names == ["heads.0", "mlp.0"]


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta_v2"])
def test_one_tensor_under_two_names_cannot_move_in_two_ways(name: str) -> None:
    model, _, _ = made(name)
    config: Any = model.config
    untied = config.to_dict() | {"tie_word_embeddings": False}
    with pytest.raises(SymmetryError, match=r"word_embeddings.* are one tensor"):
        family(config.model_type, untied, model.state_dict())


def test_names_and_shapes_are_enough() -> None:
    model, symmetry, _ = made("bert_untied")
    shapes = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    assert family("bert", model.config, shapes) == symmetry


def test_a_tied_table_may_be_saved_under_one_name() -> None:
    model, symmetry, _ = made("bert")
    config: Any = model.config
    decoder = "cls.predictions.decoder.weight"
    state = {name: tensor for name, tensor in model.state_dict().items() if name != decoder}
    (whole, *rest), (less, *others) = symmetry.spaces, family("bert", config, state).spaces
    assert [m.tensor for m in whole.axes if m not in less.axes] == [decoder]
    assert rest == others


def test_half_a_pair_cannot_turn() -> None:
    model, _, _ = made("gpt_neox")
    config: Any = model.config
    odd = config.to_dict() | {"rope_parameters": {"partial_rotary_factor": 0.4}}
    with pytest.raises(SymmetryError, match="3 of the 8 entries of a head"):
        family("gpt_neox", odd, model.state_dict())


@pytest.mark.parametrize("name", ["bert", "clip", "distilbert", "gpt2", "mixtral", "t5", "vit"])
def test_the_residual_stream_can_be_left_as_it_is(name: str) -> None:
    model, symmetry, _ = made(name)
    rest = [space for space in symmetry.spaces if not space.name.endswith("residual")]
    assert symmetry_of(model, residual=False).spaces == tuple(rest)
    assert len(rest) < len(symmetry.spaces)


def test_saved_frequencies_are_ignored() -> None:
    model, symmetry, _ = made("llama")
    state = model.state_dict() | {"model.rotary_emb.inv_freq": torch.ones(2)}
    assert family("llama", model.config, state) == symmetry


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SymmetryError, match=r"'mamba'; the known families are bert, clip.*t5, vit"):
        family("mamba", {}, {})


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5_gated", "vit", "clip", "mixtral"])
def test_a_tensor_of_another_architecture_is_refused_by_name(name: str) -> None:
    model, _, _ = made(name)
    config: Any = model.config
    state = model.state_dict() | {"layers.0.lora_A.weight": torch.zeros(2, 12)}
    with pytest.raises(SymmetryError, match=r"'layers\.0\.lora_A\.weight' is not a tensor of this"):
        family(config.model_type, config, state)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("bert", "bert.encoder.layer.1.attention.self.key.weight"),
        ("llama", "model.layers.0.mlp.up_proj.weight"),
        ("gpt2", "transformer.h.1.ln_2.weight"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.v.weight"),
        ("mixtral", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_a_missing_tensor_is_named(name: str, missing: str) -> None:
    model, _, _ = made(name)
    config: Any = model.config
    state = {tensor: value for tensor, value in model.state_dict().items() if tensor != missing}
    with pytest.raises(SymmetryError, match=f"no tensor '{missing}'"):
        family(config.model_type, config, state)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bert", {"num_attention_heads": 5}, "5 heads cannot share"),
        ("llama", {"num_key_value_heads": 3}, "3 heads cannot share"),
        ("llama", {"hidden_size": 20}, "units of 'residual'"),
        ("bert", {"num_hidden_layers": None}, "no positive 'num_hidden_layers'"),
        ("bert", {"num_hidden_layers": 1}, r"layer\.1\..* is not a tensor of this"),
        ("gpt2", {"n_layer": 3}, "no tensor"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "gives them a part"),
    ],
)
def test_a_config_of_another_model_is_refused(name: str, change: dict[str, object], message: str) -> None:
    model, _, _ = made(name)
    config: Any = model.config
    with pytest.raises(SymmetryError, match=message):
        family(config.model_type, config.to_dict() | change, model.state_dict())


def test_an_encoder_alone_has_its_heads_and_units() -> None:
    sizes = {"d_model": 12, "d_kv": 4, "d_ff": 10, "num_layers": 1, "num_heads": 3}
    encoder = hf.T5EncoderModel(hf.T5Config(**sizes, vocab_size=31))
    assert [space.name for space in symmetry_of(encoder).spaces] == ["encoder.heads", "encoder.mlp.0"]


def test_a_vision_tower_alone_hands_its_stream_out() -> None:
    model, _, _ = made("clip")
    config: Any = model.config
    state = {n: t for n, t in model.state_dict().items() if n.startswith("vision_model")}
    found = family("clip", config.vision_config, state)
    assert found.spaces[0].name == "vision.heads.0"


def test_a_frozen_stream_of_a_single_tower_is_handed_out() -> None:
    model, symmetry, _ = made("clip")
    state = model.state_dict()
    text = {n: t for n, t in state.items() if n.startswith("text")}
    config: Any = model.config
    alone = {n: t for n, t in text.items() if n.startswith("text_model")}
    with_projection = family("clip", config.text_config, text)
    assert [s.name for s in with_projection.spaces] == [
        space.name for space in symmetry.spaces if space.name.startswith("text")
    ]
    without = family("clip", config.text_config, alone)
    assert [s.name for s in without.spaces] == [s.name for s in with_projection.spaces][1:]
