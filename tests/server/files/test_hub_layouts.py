"""Files as they lie on the hub: other names, leftovers, missing tensors, other heads than the config names.

Each model is aligned to a random one of its layout. The library loads the model before and after, and the outputs that
the named architecture returns must be the same; the project's own `check` has no part in it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.architectures.proof import _Exact
from tests.server.files.stored import answer, fedbasin, refusal
from tests.strategies.symmetry.tiny_transformers import DEBERTA, DISTIL, PIXELS, ROTARY, T5, TEXT, TOKENS, VISION, hf

State = dict[str, Tensor]

WIDTH = TEXT["hidden_size"]
GPT2 = {"n_embd": 12, "n_layer": 2, "n_head": 3, "vocab_size": 31, "n_positions": 16}


def bert(head: str) -> tuple[type, Any]:
    return getattr(hf, f"Bert{head}"), hf.BertConfig(**TEXT, pad_token_id=0)


def roberta(head: str) -> tuple[type, Any]:
    return getattr(hf, f"Roberta{head}"), hf.RobertaConfig(**TEXT, pad_token_id=0)


def pooler(prefix: str) -> State:
    return {
        f"{prefix}.pooler.dense.weight": torch.randn(WIDTH, WIDTH),
        f"{prefix}.pooler.dense.bias": torch.randn(WIDTH),
    }


def without(state: State, *words: str) -> State:
    return {name: tensor for name, tensor in state.items() if not any(word in name for word in words)}


def of_tensorflow(state: State) -> State:
    names = {name: name.replace("LayerNorm.weight", "LayerNorm.gamma") for name in state}
    names = {name: new.replace("LayerNorm.bias", "LayerNorm.beta") for name, new in names.items()}
    positions = {"bert.embeddings.position_ids": torch.arange(16)[None]}
    return {names[name]: tensor for name, tensor in without(state, "decoder").items()} | positions


def bare(prefix: str) -> Callable[[State], State]:
    return lambda state: {name.removeprefix(prefix): tensor for name, tensor in without(state, "lm_head").items()}


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def plus(**tensors: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def same(state: State) -> State:
    return state


LEFTOVER = {"decoder__block__0__layer__1__EncDecAttention__relative_attention_bias__weight": torch.randn(32, 3)}
OLD_ANGLES = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(2)}
MASKS = {"h__0__attn__bias": torch.tril(torch.ones(16, 16))[None, None]}
ENDLESS = {"transformer__h__0__attn__masked_bias": torch.tensor(-torch.inf)}
SOUND = {
    "conv_dim": [4, 4],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
READING = {"is_decoder": True, "add_cross_attention": True}


def joined(kind: str, encoder: Any, decoder: Any) -> tuple[type, Any]:
    """Return a model of an encoder and a decoder that were trained apart."""
    config = getattr(hf, f"{kind}Config").from_encoder_decoder_configs(encoder, decoder)
    return getattr(hf, f"{kind}Model"), config


T5_CONFIG = hf.T5Config(**T5, decoder_start_token_id=0)

# How a file came to be: the model that wrote it, what happened to its names, and the architecture that the config names.
LAYOUTS: dict[str, tuple[tuple[type, Any], Callable[[State], State], str]] = {
    "bert-base-uncased": (bert("ForPreTraining"), of_tensorflow, "BertForMaskedLM"),
    "gpt2": (
        (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2)),
        lambda state: plus(**MASKS)(bare("transformer.")(state)),
        "GPT2LMHeadModel",
    ),
    "t5-small": (
        (hf.T5ForConditionalGeneration, T5_CONFIG),
        lambda state: plus(**LEFTOVER)(without(state, "lm_head", "embed_tokens")),
        "T5ForConditionalGeneration",
    ),
    "a token classifier with an unused pooler": (
        bert("ForTokenClassification"),
        lambda state: state | pooler("bert"),
        "BertForTokenClassification",
    ),
    "roberta-large-mnli": (
        roberta("ForSequenceClassification"),
        lambda state: state | pooler("roberta"),
        "RobertaForSequenceClassification",
    ),
    "multiple choice": (bert("ForMultipleChoice"), same, "BertForMultipleChoice"),
    "a base with the prefix of a head": (bert("Model"), prefixed("bert."), "BertModel"),
    "a language model as a base": ((hf.LlamaForCausalLM, hf.LlamaConfig(**ROTARY)), same, "LlamaModel"),
    "a base with the prefix of a language model": (
        (hf.LlamaModel, hf.LlamaConfig(**ROTARY)),
        prefixed("model."),
        "LlamaModel",
    ),
    "gpt2 as a base": (
        (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2)),
        lambda state: without(state, "lm_head"),
        "GPT2Model",
    ),
    "angles of an old version": (
        (hf.LlamaForCausalLM, hf.LlamaConfig(**ROTARY)),
        plus(**OLD_ANGLES),
        "LlamaForCausalLM",
    ),
    "an embedding of texts without a prefix": (
        (hf.Qwen3ForCausalLM, hf.Qwen3Config(**ROTARY, head_dim=6, tie_word_embeddings=True)),
        bare("model."),
        "Qwen3ForCausalLM",
    ),
    "a tied head that is stored": (
        (hf.LlamaForCausalLM, hf.LlamaConfig(**ROTARY, tie_word_embeddings=True)),
        lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()},
        "LlamaForCausalLM",
    ),
    "an encoder of t5": ((hf.T5ForConditionalGeneration, T5_CONFIG), same, "T5EncoderModel"),
    "an encoder of images": ((hf.ViTForImageClassification, hf.ViTConfig(**VISION)), same, "ViTModel"),
    "a head that another left behind": (
        (hf.DistilBertForQuestionAnswering, hf.DistilBertConfig(**DISTIL)),
        plus(vocab_projector__bias=torch.randn(31), vocab_transform__weight=torch.randn(12, 12)),
        "DistilBertForQuestionAnswering",
    ),
    "old masks that are infinite": ((hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2)), plus(**ENDLESS), "GPT2LMHeadModel"),
    "a classifier without a token for padding": (
        (hf.GPT2ForSequenceClassification, hf.GPT2Config(**GPT2, pad_token_id=None)),
        same,
        "GPT2ForSequenceClassification",
    ),
    "a decoder that reads an encoder": (
        (hf.BertLMHeadModel, hf.BertConfig(**TEXT, **READING, pad_token_id=0)),
        same,
        "BertLMHeadModel",
    ),
    "a decoder that reads an encoder, fused": (
        (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, add_cross_attention=True)),
        same,
        "GPT2LMHeadModel",
    ),
    "text to text": (
        joined("EncoderDecoder", hf.BertConfig(**TEXT, pad_token_id=0), hf.BertConfig(**TEXT, **READING)),
        same,
        "EncoderDecoderModel",
    ),
    "image to text": (
        joined("VisionEncoderDecoder", hf.ViTConfig(**VISION), hf.GPT2Config(**GPT2, add_cross_attention=True)),
        same,
        "VisionEncoderDecoderModel",
    ),
    "sound to text": (
        joined("SpeechEncoderDecoder", hf.Wav2Vec2Config(**TEXT, **SOUND), hf.BertConfig(**TEXT, **READING)),
        same,
        "SpeechEncoderDecoderModel",
    ),
    "no architecture": (bert("ForMaskedLM"), same, ""),
    "deberta": (
        (hf.DebertaV2ForTokenClassification, hf.DebertaV2Config(**DEBERTA)),
        same,
        "DebertaV2ForTokenClassification",
    ),
    "experts one by one": (
        (hf.MixtralForCausalLM, hf.MixtralConfig(**ROTARY, num_local_experts=3)),
        same,
        "MixtralForCausalLM",
    ),
}

# The sample that runs by default stands for each kind; the others are slow together.
SAMPLE = {
    *("bert-base-uncased", "gpt2", "t5-small", "a token classifier with an unused pooler", "multiple choice"),
    *("a language model as a base", "a tied head that is stored", "experts one by one"),
    *("old masks that are infinite", "a classifier without a token for padding", "a decoder that reads an encoder"),
    "image to text",
}


def write(name: str, folder: Path, seed: int) -> None:
    """Write a random model in the layout of a file."""
    (kind, config), change, architecture = LAYOUTS[name]
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.4 * noise if parameter.dim() > 1 else parameter + 0.3 * noise)
    # The library's own files, so that experts are stored as it stores them.
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    state = change({name: tensor.clone() for name, tensor in load_file(path).items()})
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["architectures"] = [architecture] if architecture else None
    (folder / "config.json").write_text(json.dumps(content))


def outputs(folder: Path, architecture: str) -> list[Tensor]:
    """Return the outputs of a folder's model after the library loaded it, in float64."""
    kind = getattr(hf, architecture or "BertForMaskedLM")
    torch.manual_seed(0)
    model = kind.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    with torch.no_grad(), _Exact():
        result = model(**inputs_of(model))
    heads = [value for name, value in result.items() if "logits" in name]
    return heads or [value for name, value in result.items() if name in ("last_hidden_state", "pooler_output")]


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Return what a model reads, with the states of an encoder where it has attention to one."""
    name = type(model).__name__
    if name.startswith("Vi"):
        inputs = {"pixel_values": PIXELS.double()}
    elif name.startswith("Speech"):
        inputs = {"input_values": torch.randn(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    elif name.endswith("MultipleChoice"):
        inputs = {"input_ids": torch.stack([TOKENS, TOKENS.flip(1)], dim=1)}
    else:
        # A classifier without padding reads one text alone.
        inputs = {"input_ids": TOKENS[:1] if model.config.get_text_config().pad_token_id is None else TOKENS}
    if name == "T5ForConditionalGeneration" or name.endswith("EncoderDecoderModel"):
        inputs["decoder_input_ids"] = TOKENS[:, :4]
    if getattr(model.config, "add_cross_attention", False):
        states = torch.randn(1, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        inputs["encoder_hidden_states"] = states.expand(len(inputs["input_ids"]), -1, -1)
    return inputs


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_a_file_of_the_hub_is_aligned_and_keeps_its_function(name: str, tmp_path: Path) -> None:
    anchor, model, out = (tmp_path / part for part in ("anchor", "model", "out"))
    write(name, anchor, 0)
    write(name, model, 1)
    (report,) = answer("align", model, "--anchor", anchor, "-o", out)
    assert report["change"] < 1e-10
    assert report["distance_after"] < report["distance_before"]
    architecture = LAYOUTS[name][2]
    before, after = outputs(model, architecture), outputs(out, architecture)
    for expected, actual in zip(before, after, strict=True):
        # Files hold float32.
        assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    old, new = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    assert sum(not torch.equal(old[name], new[name]) for name in old) > len(old) / 4


@pytest.mark.parametrize("name", ["a token classifier with an unused pooler"])
def test_what_the_model_does_not_read_stays_and_is_listed(name: str, tmp_path: Path) -> None:
    anchor, model, out = (tmp_path / part for part in ("anchor", "model", "out"))
    write(name, anchor, 0)
    write(name, model, 1)
    done = fedbasin("align", model, "--anchor", anchor, "-o", out)
    assert done.exit_code == 0
    assert "not read by BertForTokenClassification" in done.stdout
    assert "bert.pooler.dense.weight" in done.stdout
    old, new = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(old["bert.pooler.dense.weight"], new["bert.pooler.dense.weight"])
    assert not torch.equal(old["classifier.weight"], new["classifier.weight"])


def test_a_tied_head_that_is_stored_stays_the_table(tmp_path: Path) -> None:
    name = "a tied head that is stored"
    anchor, model, out = (tmp_path / part for part in ("anchor", "model", "out"))
    write(name, anchor, 0)
    write(name, model, 1)
    answer("align", model, "--anchor", anchor, "-o", out)
    state = load_file(out / "model.safetensors")
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_a_head_that_is_not_stored_keeps_the_stream_in_place(tmp_path: Path) -> None:
    LAYOUTS["no head"] = (bert("Model"), same, "BertForTokenClassification")
    try:
        write("no head", tmp_path / "model", 0)
        (report,) = answer("inspect", tmp_path / "model")
    finally:
        del LAYOUTS["no head"]
    assert any("the files lack 'classifier.weight'" in stop for stop in report["stops"])
    assert "encoder.layer.0.output.dense.bias" in report["untouched"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: {"module." + name: tensor for name, tensor in state.items()},
            "save the module inside its wrapper",
        ),
        (lambda state: {"_orig_mod." + name: tensor for name, tensor in state.items()}, "inside its wrapper"),
        (lambda state: {"net." + name: tensor for name, tensor in state.items()}, "use the config that was saved"),
        (
            lambda state: state | {"lm_head.weight": torch.randn(33, 16)},
            "'lm_head.weight (33, 16) for (31, 16)'; use the config",
        ),
        (
            lambda state: {name: (9 * t).to(torch.int8) if "up_proj" in name else t for name, t in state.items()},
            "would be loaded from integers",
        ),
    ],
)
def test_what_the_library_does_not_load_is_refused_by_name(
    change: Callable[[State], State], said: str, tmp_path: Path
) -> None:
    LAYOUTS["refused"] = ((hf.LlamaForCausalLM, hf.LlamaConfig(**ROTARY)), change, "LlamaForCausalLM")
    try:
        write("refused", tmp_path / "model", 0)
        assert said in refusal("inspect", tmp_path / "model")
    finally:
        del LAYOUTS["refused"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_parameters_that_are_not_finite_are_refused_by_every_command(value: float, tmp_path: Path) -> None:
    anchor, model, sick = (tmp_path / part for part in ("anchor", "model", "sick"))
    for seed, folder in enumerate((anchor, model, sick)):
        write("a language model as a base", folder, seed)
    state = load_file(sick / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(state, sick / "model.safetensors", {"format": "pt"})
    answer("align", model, "--anchor", anchor, "-o", tmp_path / "out", "--transform", tmp_path / "t")
    for command in (
        ("inspect", sick),
        ("check", sick),
        ("align", sick, "--anchor", anchor, "-o", tmp_path / "no"),
        ("align", anchor, "--anchor", sick, "-o", tmp_path / "no"),
        ("apply", tmp_path / "t", sick, "-o", tmp_path / "no", "--no-prove"),
    ):
        said = refusal(*command)
        assert said.startswith(f"{sick}: 'layers.0.mlp.up_proj.weight' has entries that are infinite or not a number")


def test_a_module_behind_an_encoder_of_t5_keeps_its_input(tmp_path: Path) -> None:
    anchor, model, out = (tmp_path / part for part in ("anchor", "model", "out"))
    LAYOUTS["encoder"] = ((hf.T5EncoderModel, hf.T5Config(**T5)), same, "T5EncoderModel")
    try:
        for seed, folder in enumerate((anchor, model)):
            write("encoder", folder, seed)
    finally:
        del LAYOUTS["encoder"]
    (model / "2_Dense").mkdir()
    save_file({"linear.weight": torch.randn(4, WIDTH)}, model / "2_Dense" / "model.safetensors")
    (model / "2_Dense" / "config.json").write_text("{}")
    (report,) = answer("align", model, "--anchor", anchor, "-o", out)
    assert report["distance_after"] < report["distance_before"]
    for expected, actual in zip(outputs(model, "T5EncoderModel"), outputs(out, "T5EncoderModel"), strict=True):
        assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
