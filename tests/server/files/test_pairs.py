"""Models that are not alike: what they share is aligned, and the rest moves with it or stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.server.files.stored import answer, fedbasin, refusal
from tests.server.files.test_hub_layouts import outputs
from tests.strategies.symmetry.tiny_transformers import ROTARY, T5, TEXT, hf


def save(folder: Path, kind: str, config: Any, seed: int) -> Path:
    """Save a random model whose units differ enough to be told apart."""
    torch.manual_seed(seed)
    model = getattr(hf, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.4 * noise if parameter.dim() > 1 else parameter + 0.3 * noise)
    model.save_pretrained(folder)
    return folder


def bert(folder: Path, head: str, seed: int = 0, **options: Any) -> Path:
    return save(folder, f"Bert{head}", hf.BertConfig(**{**TEXT, **options}, pad_token_id=0), seed)


def llama(folder: Path, seed: int = 0, **options: Any) -> Path:
    return save(folder, "LlamaForCausalLM", hf.LlamaConfig(**{**ROTARY, **options}), seed)


def change(folder: Path, **tensors: Tensor | None) -> None:
    path = folder / "model.safetensors"
    state = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path, {"format": "pt"})


def fine_tuned(base: Path, folder: Path, head: str) -> Path:
    """Save another architecture with the base's weights, transformed and with a little noise; return its folder."""
    config = hf.BertConfig(**TEXT, pad_token_id=0, num_labels=3)
    torch.manual_seed(5)
    model = getattr(hf, f"Bert{head}").from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    order = torch.randperm(TEXT["intermediate_size"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.001 * torch.randn(parameter.shape))
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight.copy_(layer.intermediate.dense.weight[order])
            layer.intermediate.dense.bias.copy_(layer.intermediate.dense.bias[order])
            layer.output.dense.weight.copy_(layer.output.dense.weight[:, order])
    model.save_pretrained(folder)
    return folder


def align(model: Path, anchor: Path, architecture: str) -> dict[str, Any]:
    """Align a model, check its outputs by the library, and return the report."""
    out = model.with_name("out")
    (report,) = answer("align", model, "--anchor", anchor, "-o", out)
    for expected, actual in zip(outputs(model, architecture), outputs(out, architecture), strict=True):
        assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    return report


@pytest.mark.parametrize("base", ["ForMaskedLM", "Model", "ForTokenClassification"])
def test_a_fine_tuned_model_is_aligned_to_its_base(base: str, tmp_path: Path) -> None:
    anchor = bert(tmp_path / "anchor", base)
    model = fine_tuned(anchor, tmp_path / "model", "ForSequenceClassification")
    report = align(model, anchor, "BertForSequenceClassification")
    assert "classifier.weight" in report["apart"]
    # Only the noise of fine-tuning is left.
    assert report["distance_after"] < 0.2 < 2 < report["distance_before"]


def test_a_base_is_aligned_to_a_fine_tuned_model(tmp_path: Path) -> None:
    model = bert(tmp_path / "model", "ForMaskedLM")
    anchor = fine_tuned(model, tmp_path / "anchor", "ForSequenceClassification")
    report = align(model, anchor, "BertForMaskedLM")
    assert "cls.predictions.transform.dense.weight" in report["apart"]
    assert report["distance_after"] < 0.2


@pytest.mark.parametrize("side", ["model", "anchor"])
def test_what_one_side_stores_and_the_other_derives_is_no_obstacle(side: str, tmp_path: Path) -> None:
    folders = {
        name: llama(tmp_path / name, seed, tie_word_embeddings=True) for seed, name in enumerate(("model", "anchor"))
    }
    table = load_file(folders[side] / "model.safetensors")["model.embed_tokens.weight"].clone()
    change(folders[side], lm_head__weight=table, model__position_ids=torch.arange(16)[None])
    report = align(folders["model"], folders["anchor"], "LlamaForCausalLM")
    assert report["apart"] == []
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        state.get("lm_head.weight", state["model.embed_tokens.weight"]), state["model.embed_tokens.weight"]
    )


def test_a_vocabulary_that_grew_is_compared_on_its_common_rows(tmp_path: Path) -> None:
    anchor, model = llama(tmp_path / "anchor"), llama(tmp_path / "model", 1, vocab_size=35)
    report = align(model, anchor, "LlamaForCausalLM")
    assert report["apart"] == []
    assert report["distance_after"] < report["distance_before"]


def test_vocabularies_in_another_order_are_compared_token_by_token(tmp_path: Path) -> None:
    anchor, model = llama(tmp_path / "anchor"), llama(tmp_path / "model")
    order = torch.randperm(31, generator=torch.Generator().manual_seed(0))
    state = load_file(model / "model.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    change(model, **{name.replace(".", "__"): state[name][order].contiguous() for name in names})
    for folder, rows in ((anchor, torch.arange(31)), (model, order)):
        vocabulary = {f"token {token}": row for row, token in enumerate(rows.tolist())}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    report = align(model, anchor, "LlamaForCausalLM")
    assert report["distance_before"] == 0


def test_experts_are_aligned_one_by_one_as_the_library_stores_them(tmp_path: Path) -> None:
    config = hf.MixtralConfig(**ROTARY, num_local_experts=3)
    anchor = save(tmp_path / "anchor", "MixtralForCausalLM", config, 0)
    shutil.copytree(anchor, tmp_path / "model")
    state = load_file(anchor / "model.safetensors")
    experts = {name: tensor for name, tensor in state.items() if ".experts." in name}
    assert len(experts) == 18
    # The experts change places, and so do the rows of their gate.
    moved = {name.replace("experts.0", "experts.x"): tensor for name, tensor in experts.items()}
    moved = {name.replace("experts.2", "experts.0"): tensor for name, tensor in moved.items()}
    moved = {name.replace("experts.x", "experts.2"): tensor.clone() for name, tensor in moved.items()}
    gates = {name: tensor[[2, 1, 0]].contiguous() for name, tensor in state.items() if name.endswith(".gate.weight")}
    assert len(gates) == 2
    save_file({**state, **moved, **gates}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    report = align(tmp_path / "model", anchor, "MixtralForCausalLM")
    assert report["distance_after"] < 1e-4 < 1 < report["distance_before"]
    aligned = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(aligned[name], tensor, atol=1e-5) for name, tensor in state.items())


def test_a_transform_of_experts_is_applied_to_another_file(tmp_path: Path) -> None:
    config = hf.MixtralConfig(**ROTARY, num_local_experts=3)
    anchor, model = (save(tmp_path / name, "MixtralForCausalLM", config, seed) for seed, name in enumerate("ab"))
    answer("align", model, "--anchor", anchor, "-o", tmp_path / "out", "--transform", tmp_path / "t")
    done = fedbasin("apply", tmp_path / "t", model, "-o", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert "proven by execution" in done.stdout
    out, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(out[name], again[name]) for name in out)


def test_a_module_that_reads_the_output_is_kept_and_the_output_stays(tmp_path: Path) -> None:
    anchor, model = bert(tmp_path / "anchor", "ForMaskedLM"), bert(tmp_path / "model", "ForMaskedLM", 1)
    reader = model / "2_Dense"
    reader.mkdir()
    save_file({"linear.weight": torch.randn(4, 12)}, reader / "model.safetensors")
    (reader / "config.json").write_text("{}")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").write_bytes(b"old")
    out = tmp_path / "out"
    done = fedbasin("align", model, "--anchor", anchor, "-o", out)
    assert done.exit_code == 0, done.output
    assert (out / "2_Dense" / "model.safetensors").read_bytes() == (reader / "model.safetensors").read_bytes()
    assert "onnx/model.onnx holds other weights" in done.stderr
    kind = hf.BertModel
    before, after = (kind.from_pretrained(folder, add_pooling_layer=False).double().eval() for folder in (model, out))
    tokens = torch.arange(2, 12).view(2, 5)
    change = after(tokens).last_hidden_state - before(tokens).last_hidden_state
    assert change.abs().max() < 1e-4


def test_models_of_other_sizes_share_nothing(tmp_path: Path) -> None:
    anchor = llama(tmp_path / "anchor", hidden_size=24, intermediate_size=14, head_dim=6)
    model = llama(tmp_path / "model")
    said = refusal("align", model, "--anchor", anchor, "-o", tmp_path / "out")
    assert "architecture" in said


def test_nothing_is_written_when_the_function_would_change(tmp_path: Path) -> None:
    anchor, model = llama(tmp_path / "anchor"), llama(tmp_path / "model", 1)
    notation = tmp_path / "notation.txt"
    text = fedbasin("inspect", model, "--notation").stdout
    notation.write_text(text.replace(" model.layers.1.mlp.down_proj.weight[1]@1", ""))
    command = ("align", model, "--anchor", anchor, "-o", tmp_path / "out", "--symmetry", notation)
    assert "its outputs would change by" in refusal(*command)
    assert not (tmp_path / "out").exists()
    done = fedbasin(*command, "--no-prove")
    assert done.exit_code == 0
    assert "not proven by execution: --no-prove" in done.stdout


def test_an_encoder_decoder_is_aligned_to_a_stored_encoder(tmp_path: Path) -> None:
    # An encoder changes the config that it is made of.
    config, other = (hf.T5Config(**T5, decoder_start_token_id=0) for _ in range(2))
    anchor = save(tmp_path / "anchor", "T5EncoderModel", config, 0)
    model = save(tmp_path / "model", "T5ForConditionalGeneration", other, 1)
    report = align(model, anchor, "T5ForConditionalGeneration")
    assert report["distance_after"] < report["distance_before"]
    assert all(name.startswith(("decoder.", "lm_head.")) for name in report["apart"])


def test_an_anchor_that_does_not_load_as_the_model_is_of_another_architecture(tmp_path: Path) -> None:
    model = bert(tmp_path / "model", "ForMaskedLM")
    anchor = save(tmp_path / "anchor", "LlamaForCausalLM", hf.LlamaConfig(**ROTARY), 0)
    said = refusal("align", model, "--anchor", anchor, "-o", tmp_path / "out")
    assert "are of two architectures: their configs differ in " in said
