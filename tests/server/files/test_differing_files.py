"""`fedbasin merge` on files that people have: saved by several versions, by several names, and in unusual dtypes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedbasin.server.files.merge.layout import _DTYPES
from fedbasin.strategies.fusion.rules.merging_rules import RULES
from tests.server.files.stored import answer, fedbasin, refusal, tensors

State = dict[str, Tensor]


def llama(folder: Path, seed: int, **settings: object) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=31, **settings)).save_pretrained(folder)
    return folder


def gpt2(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=31, n_positions=16)).save_pretrained(folder)
    return folder


def changed(source: Path, folder: Path, change: Callable[[State], State]) -> Path:
    """Copy a model with other tensors."""
    shutil.copytree(source, folder)
    save_file(change(tensors(source)), folder / "model.safetensors", {"format": "pt"})
    return folder


def reconfigured(source: Path, folder: Path, **keys: object) -> Path:
    """Copy a model with other keys of its configuration."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, with the models a and b."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        llama(tmp_path / name, seed)
    return tmp_path


def mean_of(*states: State) -> State:
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def near(folder: Path, expected: State) -> None:
    result = tensors(folder)
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("order", [("plain", "doubled"), ("doubled", "plain")])
def test_a_tied_head_that_one_model_stores_twice_is_stored_once(tmp_path: Path, order: tuple[str, str]) -> None:
    plain = llama(tmp_path / "plain", 1, tie_word_embeddings=True)
    table = "model.embed_tokens.weight"
    changed(
        llama(tmp_path / "b", 2, tie_word_embeddings=True),
        tmp_path / "doubled",
        lambda state: state | {"lm_head.weight": state[table].clone()},
    )
    paths = [tmp_path / name for name in order]
    (report,) = answer("merge", *paths, "--rule", "linear", "-o", tmp_path / "out")
    assert report["dropped"] == ["lm_head.weight"]
    near(tmp_path / "out", mean_of(tensors(plain), tensors(tmp_path / "b")))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


def test_a_head_of_its_own_beside_a_tied_one_is_refused(tmp_path: Path) -> None:
    tied = llama(tmp_path / "tied", 1, tie_word_embeddings=True)
    other = changed(tied, tmp_path / "other", lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"] + 1})
    assert "tied has no tensor 'lm_head.weight'" in refusal("merge", tied, other, "--rule", "linear", "-o", "out")


@pytest.mark.parametrize("first", ["whole", "inner"])
def test_names_with_and_without_the_inner_model_are_merged(tmp_path: Path, first: str) -> None:
    whole = gpt2(tmp_path / "whole", 1)
    inner = changed(
        gpt2(tmp_path / "c", 2),
        tmp_path / "inner",
        lambda state: {name.removeprefix("transformer."): tensor for name, tensor in state.items()},
    )
    second = {"whole": inner, "inner": whole}[first]
    done = fedbasin("merge", tmp_path / first, second, "--rule", "linear", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    expected = mean_of(tensors(whole), tensors(tmp_path / "c"))
    if first == "inner":
        expected = {name.removeprefix("transformer."): tensor for name, tensor in expected.items()}
    near(tmp_path / "out", expected)


BUFFERS = {
    "llama": {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2) for layer in range(2)},
    "gpt2": {
        **{f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)},
        **{f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)},
    },
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_of_older_versions_are_left_out(tmp_path: Path, family: str, first: bool) -> None:
    make = {"llama": llama, "gpt2": gpt2}[family]
    new, plain = make(tmp_path / "new", 1), make(tmp_path / "plain", 2)
    old = changed(plain, tmp_path / "old", lambda state: state | BUFFERS[family])
    (report,) = answer("merge", *((old, new) if first else (new, old)), "--rule", "linear", "-o", tmp_path / "out")
    assert report["dropped"] == sorted(BUFFERS[family])
    near(tmp_path / "out", mean_of(tensors(new), tensors(plain)))


def test_a_parameter_that_one_model_lacks_is_refused(models: Path) -> None:
    changed(Path("a"), Path("more"), lambda state: state | {"model.layers.0.self_attn.bias": torch.ones(3)})
    said = refusal("merge", "b", "more", "--rule", "linear", "-o", "out")
    assert said.startswith("b has no tensor 'model.layers.0.self_attn.bias', but more has")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rms_norm_eps": 1e-3}, ["rms_norm_eps"]),
        ({"hidden_act": "gelu"}, ["hidden_act"]),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, ["rope_parameters.rope_theta"]),
        ({"_name_or_path": "elsewhere", "transformers_version": "4.0"}, []),
    ],
    ids=str,
)
def test_keys_in_which_configurations_differ_are_named(models: Path, keys: dict, named: list[str]) -> None:
    reconfigured(Path("b"), Path("c"), **keys)
    (report,) = answer("merge", "a", "c", "--rule", "linear", "-o", "out")
    assert report["config"] == named
    done = fedbasin("merge", "a", "c", "--rule", "linear", "-o", "again")
    assert all(repr(key) in done.stdout for key in named)


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "head_dim"])
def test_other_heads_in_weights_of_one_shape_are_refused(models: Path, key: str) -> None:
    value = json.loads(Path("b/config.json").read_text())[key]
    reconfigured(Path("b"), Path("c"), **{key: 2 * value})
    said = refusal("merge", "a", "c", "--rule", "linear", "-o", "out")
    assert said.startswith(f"c/config.json: {key} is {2 * value}, but {value} in a, so the same rows belong to other")


def test_a_link_to_the_base_model_is_the_base_model(models: Path) -> None:
    Path("link").symlink_to("a")
    for number, base in enumerate(("a", "link", models / "a", "./a/")):
        options = ("--rule", "model_stock", "--anchor", "a", "-o", f"out{number}")
        llama(models / "c", 5)
        assert not fedbasin("merge", base, "b", "c", *options).exit_code
        near(models / f"out{number}", tensors(models / "out0"))


def test_a_plus_in_a_name_is_no_adapter(models: Path) -> None:
    shutil.copytree("a", "a+out")
    assert not fedbasin("merge", "a+out", "b", "--rule", "linear", "-o", "out").exit_code
    near(Path("out"), mean_of(tensors(Path("a")), tensors(Path("b"))))


def test_settings_without_effect_are_named(models: Path) -> None:
    Path("recipe.yaml").write_text(
        """
models:
- {model: a, parameters: {weight: 1}}
- model: b
  parameters:
    density: [{filter: self_atn, value: 0.1}, {value: [{filter: mlp, value: 1}, {value: 0.5}]}, {filter: mlp, value: 0}]
merge_method: ties
base_model: a
"""
    )
    (report,) = answer("merge", "recipe.yaml", "-o", "out")
    assert report["unused"] == [
        "parameters of a, which is the base model",
        "filter 'self_atn' of density, which fits no tensor",
        "filter 'mlp' of density, which stands behind one for all tensors",
    ]


@pytest.mark.parametrize("dtype", [dtype for dtype in _DTYPES if not dtype.is_floating_point or dtype.itemsize == 1])
def test_tensors_of_every_dtype_that_is_not_merged_are_copied(models: Path, dtype: torch.dtype) -> None:
    for name in "ab":
        extra = torch.ones(4).to(dtype)
        changed(Path(name), Path(f"{name}x"), lambda state, extra=extra: state | {"x": extra})
    done = fedbasin("merge", "ax", "bx", "--rule", "linear", "-o", "out")
    assert done.exit_code == 0, done.output
    assert tensors(Path("out"))["x"].dtype == dtype


@pytest.mark.parametrize("first", [True, False])
def test_eight_bits_beside_a_wide_dtype_are_refused(models: Path, first: bool) -> None:
    head = "lm_head.weight"
    changed(Path("b"), Path("narrow"), lambda state: state | {head: state[head].to(torch.float8_e4m3fn)})
    order = ("a", "narrow") if first else ("narrow", "a")
    said = refusal("merge", *order, "--rule", "linear", "-o", "out")
    assert f"{order[1]}: '{head}' is " in said
    assert said.endswith("convert the models to one dtype first")


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.statistic and not rule.scored])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_every_rule_names_the_model_whose_entries_are_not_finite(models: Path, rule: str, value: float) -> None:
    changed(Path("b"), Path("broken"), lambda state: state | {"lm_head.weight": state["lm_head.weight"] * value})
    llama(models / "c", 5)
    needs = RULES[rule]
    others = ["c"] * (needs.most != 1)
    options = [
        *(["--anchor", "a"] if needs.anchor == "required" else []),
        *(["-p", "t=0.5"] if "t" in needs.shared else []),
        *(["-p", "density=0.5"] if "density" in needs.per_model else []),
        *(["-p", "select_topk=0.5"] if "select_topk" in needs.shared else []),
    ]
    command = ("merge", "broken", *others, "--rule", rule, *options, "-o", "out")
    if (rule, value) == ("nearswap", torch.inf):
        # What is far from the anchor moves it by nothing.
        assert not fedbasin(*command).exit_code
        return
    said = refusal(*command)
    assert said == "lm_head.weight: is infinite or not a number in broken; leave this model out"


FILES = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "is a pointer of Git LFS to the file",
    b"PK\x03\x04 and more": "holds pickled weights",
    b"\x80\x02 and more": "holds pickled weights",
    b"": "not a whole safetensors file",
}


@pytest.mark.parametrize("content", FILES, ids=FILES.values())
def test_files_of_other_formats_are_named(models: Path, content: bytes) -> None:
    Path("a/model.safetensors").write_bytes(content)
    assert FILES[content] in refusal("merge", "a", "b", "--rule", "linear", "-o", "out")


def test_an_empty_folder_is_replaced_by_force_alone(models: Path) -> None:
    Path("out").mkdir()
    command = ("merge", "a", "b", "--rule", "linear", "-o", "out")
    assert "is there already" in refusal(*command)
    assert not fedbasin(*command, "--force").exit_code
    near(Path("out"), mean_of(tensors(Path("a")), tensors(Path("b"))))


@pytest.mark.parametrize("size", ["nan", "inf"])
def test_a_size_of_files_that_is_not_finite_is_bad_usage(models: Path, size: str) -> None:
    done = fedbasin("merge", "a", "b", "--rule", "linear", "-o", "out", "--shard-size", size)
    assert done.exit_code == 2
    assert "is not a finite number" in done.stderr


def tokenized(folder: Path, tokens: object, seed: int) -> Path:
    llama(folder, seed)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
    return folder


WORDS = {f"w{place}": place for place in range(31)}


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ({}, "has no tokens"),
        ({"a": -1}, "the place of 'a' is no number of a row"),
        ({"a": "x"}, "the place of 'a' is no"),
    ],
    ids=str,
)
def test_tokenizers_without_tokens_or_places_are_refused(models: Path, tokens: object, reason: str) -> None:
    tokenized(Path("c"), tokens, 2)
    tokenized(Path("d"), WORDS, 3)
    assert reason in refusal("merge", "c", "d", "--rule", "linear", "-o", "out")


@pytest.mark.parametrize("source", ["d", "./d", "{folder}/d", {"model": {"path": "d"}}], ids=str)
def test_any_spelling_of_a_model_gives_the_tokenizer(models: Path, source: object) -> None:
    tokenized(Path("c"), WORDS, 2)
    tokenized(Path("d"), {f"w{place}": 30 - place for place in range(31)}, 3)
    spelt = source.format(folder=models) if isinstance(source, str) else source
    recipe = {"merge_method": "linear", "models": [{"model": "c"}, {"model": "d"}], "tokenizer": {"source": spelt}}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    (report,) = answer("merge", "recipe.yaml", "-o", "out")
    assert report["reference"] == "d"
    table = "model.embed_tokens.weight"
    expected = (tensors(Path("c"))[table].flip(0) + tensors(Path("d"))[table]) / 2
    torch.testing.assert_close(tensors(Path("out"))[table], expected)
    shown = fedbasin("merge", "recipe.yaml", "-o", "again").stdout
    assert "copied from d: " in shown


def test_the_number_of_tokens_of_a_text_model_is_written_where_it_stands(models: Path) -> None:
    for seed, name in enumerate("cd"):
        words = {f"w{place}": place for place in range(31)} | ({"x": 31} if name == "d" else {})
        tokenized(Path(name), words, seed)
        config = json.loads(Path(name, "config.json").read_text())
        nested = {key: config.pop(key) for key in ("vocab_size",)}
        Path(name, "config.json").write_text(json.dumps({**config, "text_config": nested}))
    Path("recipe.yaml").write_text("merge_method: linear\nmodels: [{model: c}, {model: d}]\ntokenizer_source: union\n")
    (report,) = answer("merge", "recipe.yaml", "-o", "out")
    assert report["vocabulary"] == 32
    assert json.loads(Path("out/config.json").read_text())["text_config"] == {"vocab_size": 32}
    assert len(tensors(Path("out"))["lm_head.weight"]) == 32
