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
from tests.server.files.stored import answer, fedbasin
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
    inputs = {"pixel_values": PIXELS.double()} if architecture.startswith("ViT") else {"input_ids": TOKENS}
    if architecture == "T5ForConditionalGeneration":
        inputs["decoder_input_ids"] = TOKENS[:, :4]
    if architecture.endswith("MultipleChoice"):
        inputs = {"input_ids": torch.stack([TOKENS, TOKENS.flip(1)], dim=1)}
    with torch.no_grad(), _Exact():
        result = model(**inputs)
    heads = [value for name, value in result.items() if "logits" in name]
    return heads or [value for name, value in result.items() if name in ("last_hidden_state", "pooler_output")]


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
