"""`fedbasin merge` on small models: what it writes, what it refuses, and that nothing is left behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.server.files.stored import answer, fedbasin, outputs, perceptron, planted, refusal, saved, tensors

LAYERS = 4


def llama(
    folder: Path, seed: int, shard: str = "1GB", dtype: torch.dtype = torch.float32, layers: int = LAYERS
) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=31)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def stored_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [llama(folder / name, seed) for seed, name in enumerate(("base", "a", "b", "c"))]


@pytest.fixture
def models(stored_models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with links to the models base, a, b and c, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    for model in stored_models:
        (tmp_path / model.name).symlink_to(model)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def state(folder: Path) -> dict[str, Tensor]:
    return tensors(folder)


def equal(folder: Path, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    result = state(folder)
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=tolerance, atol=tolerance)


def test_the_result_loads_and_is_the_rule_of_every_tensor(models: Path) -> None:
    report = answer("merge", "a", "b", "--rule", "linear", "--weight", 3, "--weight", 1, "-o", "out")[0]
    a, b = state(models / "a"), state(models / "b")
    equal(models / "out", {name: 0.75 * a[name] + 0.25 * b[name] for name in a})
    assert (report["tensors"], report["parameters"]) == (len(a), sum(t.numel() for t in a.values()))
    _, info = AutoModelForCausalLM.from_pretrained(models / "out", output_loading_info=True)
    assert not any(info.values())
    assert sorted(p.name for p in models.iterdir()) == ["a", "b", "base", "c", "out"]


@pytest.mark.parametrize("shard", [1e-5, 5.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_shards_and_dtypes(models: Path, shard: float, dtype: str) -> None:
    narrow = llama(models / "n", 7, "9KB", torch.bfloat16)
    assert not fedbasin(
        "merge",
        narrow,
        "a",
        "--rule",
        "task_arithmetic",
        "--anchor",
        "base",
        "-o",
        "out",
        "--shard-size",
        shard,
        "--dtype",
        dtype,
    ).exit_code
    out = models / "out"
    files = list(out.glob("*.safetensors"))
    assert len(files) == 1 if shard > 1 else 1 < len(files) < 6
    assert all(path.stat().st_size < shard * 1e9 + 4000 for path in files)
    base = state(models / "base")
    kind = getattr(torch, dtype)
    expected = {
        n: (t + (state(narrow)[n].float() - t) + (state(models / "a")[n] - t)).to(kind) for n, t in base.items()
    }
    equal(out, expected, torch.finfo(kind).eps)
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == kind


def test_files_without_a_folder(tmp_path: Path) -> None:
    a, b = (perceptron(tmp_path / f"{seed}.safetensors", seed, {"note": "kept"}) for seed in (1, 2))
    out = tmp_path / "out.safetensors"
    assert not fedbasin("merge", a, b, "--rule", "linear", "-o", out).exit_code
    expected = load_file(b)
    equal(out, {name: (tensor + expected[name]) / 2 for name, tensor in load_file(a).items()})


# mergekit's own examples, with the names of the models here, and recipes of its documentation.
EXAMPLES = {
    "linear": """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
""",
    "ties": """
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "gradient-slerp": """
slices:
  - sources:
      - model: a
        layer_range: [0, 4]
      - model: b
        layer_range: [0, 4]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
    "44-layer": """
slices:
  - sources:
    - model: a
      layer_range: [0, 3]
  - sources:
    - model: b
      layer_range: [1, 4]
merge_method: passthrough
dtype: float16
""",
    "bio-merge": """
models:
  - model: a
    parameters: {density: 0.5, weight: 0.5}
  - model: b
    parameters: {density: 0.5, weight: 0.5}
merge_method: ties
base_model: base
parameters: {normalize: false, int8_mask: true}
dtype: float16
""",
    "arcee_fusion": """
models:
  - model: a
  - model: b
merge_method: arcee_fusion
base_model: a
dtype: bfloat16
""",
    "dare_ties": """
models:
  - model: base
  - model: a
    parameters: {density: 0.53, weight: 0.4}
  - model: b
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: base
parameters: {int8_mask: true}
dtype: bfloat16
""",
    "della": """
models:
  - model: a
    parameters: {density: 0.5, weight: 0.5, epsilon: 0.2}
merge_method: della
base_model: base
parameters: {normalize: true, lambda: 1.1}
""",
    "breadcrumbs": """
models:
  - model: a
    parameters: {density: 0.9, gamma: 0.01, weight: 0.5}
merge_method: breadcrumbs
base_model: base
""",
    "model_stock": """
models: [{model: a}, {model: b}, {model: c}]
merge_method: model_stock
base_model: base
dtype: bfloat16
""",
    "nuslerp": """
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.9}}
merge_method: nuslerp
base_model: base
parameters: {nuslerp_flatten: false}
out_dtype: bfloat16
""",
    "sce": "models: [{model: a}, {model: b}]\nmerge_method: sce\nbase_model: base\nparameters: {select_topk: 0.1}\n",
    "karcher": "models: [{model: a}, {model: b}, {model: c}]\nmerge_method: karcher\nparameters: {max_iter: 5, tol: 1e-5}\n",
    "multislerp": """
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2}}]
merge_method: multislerp
parameters: {normalize_weights: true, eps: 1e-8}
""",
    "nearswap": "models: [{model: a}]\nmerge_method: nearswap\nbase_model: base\nparameters: {t: 0.0001}\n",
    "ram": "models: [{model: a}, {model: b}]\nmerge_method: ramplus_tl\nbase_model: base\nparameters: {r: 0.2}\n",
    "scaled": """
slices:
  - sources:
    - model: a
      layer_range: [0, 2]
      parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}
  - sources: [{model: a, layer_range: [1, 4]}]
merge_method: passthrough
""",
    "masks": "models: [{model: a}, {model: b}]\nmerge_method: linear\nparameters: {int8_mask: true, normalize: 1.0}\n",
    "no parameters": "models:\n- model: a\n  parameters:\n    # none\n- model: b\nmerge_method: linear\nparameters:\n",
    "shared parameters": """
models:
- model: a
  parameters: &shared {weight: 0.5, density: 0.5}
- model: b
  parameters: {<<: *shared, weight: 0.2}
merge_method: ties
base_model: base
""",
    "nested path": "models: [{model: {model: {path: a, revision: null}, lora: null}}]\nmerge_method: passthrough\n",
    "tokenizer_source": "models: [{model: a}, {model: b}]\nmerge_method: linear\nparameters: {weight: 0.5}\ndtype: float32\n",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_recipes_of_mergekit_run_unchanged(models: Path, name: str) -> None:
    done = fedbasin("merge", write(models / "recipe.yaml", EXAMPLES[name]), "-o", "out")
    assert done.exit_code == 0, done.output
    _, info = AutoModelForCausalLM.from_pretrained(models / "out", output_loading_info=True)
    assert not any(info.values())


def test_gradients_and_filters_choose_by_layer_and_name(models: Path) -> None:
    fedbasin(
        "merge", write(models / "recipe.yaml", EXAMPLES["gradient-slerp"].replace("dtype: float16", "")), "-o", "out"
    )
    a, b, out = (state(models / name) for name in ("a", "b", "out"))
    # Five values over four layers: attention 0, then between .5 and .3 at 4/3 of them, and 1 at the end.
    for name, t in (
        ("layers.0.self_attn.q_proj", 0.0),
        ("layers.3.self_attn.q_proj", 1.0),
        ("layers.3.mlp.up_proj", 0.0),
    ):
        torch.testing.assert_close(
            out[f"model.{name}.weight"], torch.lerp(a[f"model.{name}.weight"], b[f"model.{name}.weight"], t)
        )
    middle = out["model.layers.1.self_attn.q_proj.weight"]
    from tests.strategies.fusion.rules.inputs import merge

    key = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(middle, merge("slerp", a[key], [b[key]], t=0.5 + (0.3 - 0.5) / 3))
    torch.testing.assert_close(out["lm_head.weight"], merge("slerp", a["lm_head.weight"], [b["lm_head.weight"]], t=0.5))


def test_slices_are_stacked_and_the_config_follows(models: Path) -> None:
    fedbasin("merge", write(models / "recipe.yaml", EXAMPLES["44-layer"].replace("dtype: float16", "")), "-o", "out")
    a, b, out = (state(models / name) for name in ("a", "b", "out"))
    assert json.loads((models / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    for layer, (source, own) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        key = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(out[key.format(layer)], source[key.format(own)])
    # Embeddings come from the first slice, norm and head from the last.
    assert torch.equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(out["lm_head.weight"], b["lm_head.weight"])


def test_random_rules_repeat_and_differ_by_seed(models: Path) -> None:
    results = []
    for number, seed in enumerate((0, 0, 1)):
        text = EXAMPLES["dare_ties"] + f"seed: {seed}\n"
        fedbasin("merge", write(models / "recipe.yaml", text), "-o", f"out{number}")
        results.append((models / f"out{number}" / "model.safetensors").read_bytes())
    assert results[0] == results[1] != results[2]


REFUSALS = {
    "rule": ("merge_method: tiez\nmodels: [{model: a}]\n", "merge_method: 'tiez' is unknown; there are linear"),
    "key": ("merge_method: linear\nmodels: [{model: a}]\nchat_template: x\n", "chat_template is unknown here"),
    "source key": ("merge_method: linear\nmodels: [{model: a, wieght: 1}]\n", "models.0.wieght is unknown here"),
    "parameter": (
        "merge_method: linear\nmodels: [{model: a, parameters: {density: 1}}]\n",
        "linear has no parameter 'density'; it has normalize, weight",
    ),
    "value": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: much}}]\n",
        "weight is 'much'; it must be a number",
    ),
    "flag": (
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {normalize: 2}\n",
        "normalize is 2; it must be true or false",
    ),
    "filter": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{fitler: x, value: 1}]}}]\n",
        "weight has the key 'fitler'",
    ),
    "no value": ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n", "t has no value for"),
    "both": (
        "merge_method: linear\nmodels: [{model: a}]\nslices: [{sources: [{model: a}]}]\n",
        "models, slices: give one of the two",
    ),
    "no base": ("merge_method: ties\nmodels: [{model: a}]\n", "base_model: ties needs the model"),
    "base unused": ("merge_method: linear\nbase_model: base\nmodels: [{model: a}]\n", "base is none of its models"),
    "count": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {t: 0.5}\n",
        "slerp takes 1 beside the base model, but there are 2",
    ),
    "missing": ("merge_method: linear\nmodels: [{model: nowhere}]\n", "nowhere: there is no such file or folder"),
    "range": (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 9]}]}]\n",
        "[2, 9] is not within the 4 layers of a",
    ),
    "lengths": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]\n",
        "have [2, 3] layers; give equally many",
    ),
    "dtype": ("merge_method: linear\nmodels: [{model: a}]\ndtype: int3\n", "dtype: Input should be 'float16'"),
    "revision": (
        "merge_method: linear\nmodels: [{model: {model: {path: a, revision: v2}}}]\n",
        "models.0.model: model.revision is unknown here",
    ),
    "nested": (
        "merge_method: linear\nmodels: [{model: {path: a}}]\n",
        "models.0.model: path is unknown here; write {model: {path: BASE}, lora: {path: ADAPTER}}",
    ),
    "number": ("merge_method: linear\nmodels: [{model: 2024}]\n", "models.0.model: 2024 is no text; write the path in"),
    "twice": (
        "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: 1\n    weight: 2\n",
        "line 6: the key 'weight' is there twice; leave one out",
    ),
    "whole number": (
        "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: 3.7}\n",
        "max_iter is 3.7; it must be a whole number",
    ),
    "percentage": (
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}]\nparameters: {density: 30}\n",
        "density is 30; it is a fraction, from 0 to 1",
    ),
    "tolerance": (
        "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {tol: -1}\n",
        "tol is -1; it must be at least 0",
    ),
    "not a number": (
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: .nan}\n",
        "weight is nan; it must be a number",
    ),
    "list of filters": (
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: {filter: [q, k], value: 1}}\n",
        "weight has the filter ['q', 'k']; a filter is one text",
    ),
    "no list": ("merge_method: linear\nmodels: {model: a}\n", "recipe.yaml: models must be a list"),
    "yaml": ("merge_method: [\n", "cannot be read as YAML"),
    "words": ("hello", "holds no keys"),
    "align": (
        "merge_method: linear\nslices: [{sources: [{model: a}]}]\nalign: star\n",
        "only whole models can be aligned",
    ),
    "tokenizer": (
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\ntokenizer_source: union\n",
        "a: has no tokenizer and vocab_size",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_recipes_are_refused_by_name(models: Path, name: str) -> None:
    text, reason = REFUSALS[name]
    assert reason in refusal("merge", write(models / "recipe.yaml", text), "-o", "out")
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("a", "b", "-o", "out"), "--rule: is missing"),
        (("a", "b", "--rule", "linear", "--weight", 1, "-o", "out"), "--weight: was given 1 times for 2 models"),
        (("a", "--rule", "linear", "-p", "normalize", "-o", "out"), "--parameter: 'normalize' has no value"),
        (("a", "--rule", "linear", "-p", "normalize=[", "-o", "out"), "the value of normalize cannot be read as YAML"),
        (
            ("a", "--rule", "linear", "-p", "normalize=true", "-p", "normalize=false", "-o", "out"),
            "--parameter: normalize was given twice",
        ),
        (
            ("a", "--rule", "linear", "-p", "weight=1", "--weight", 2, "-o", "out"),
            "--parameter: weight was given twice",
        ),
        (("a", "--rule", "linear", "-o", "a"), "is a itself"),
        (("a", "b", "--rule", "linear", "-o", "c"), "is there already"),
        (("a", "b", "--rule", "linear", "-o", "no/where"), "its folder does not exist"),
    ],
    ids=str,
)
def test_impossible_commands_are_refused_by_name(models: Path, arguments: tuple, reason: str) -> None:
    assert reason in refusal("merge", *arguments)


def test_models_that_do_not_fit_are_refused_from_their_headers(models: Path) -> None:
    llama(models / "deep", 9, layers=5)
    assert "a has no tensor 'model.layers.4" in refusal("merge", "a", "deep", "--rule", "linear", "-o", "out")
    shutil.copytree("a", "broken")
    broken = state(models / "a") | {"lm_head.weight": torch.zeros(31, 8)}
    save_file(broken, "broken/model.safetensors", {"format": "pt"})
    said = refusal("merge", "a", "broken", "--rule", "linear", "-o", "out")
    assert said == "broken: 'lm_head.weight' has shape (31, 8), but in a (31, 16); merge models of one architecture"


def test_integers_are_copied_if_they_agree(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, number in zip(paths, (3, 3, 4), strict=True):
        counter = torch.tensor(number + len(path.name) * number)
        save_file({"w": torch.ones(2) * number, "ids": torch.tensor([number]), "bn.num_batches_tracked": counter}, path)
    assert not fedbasin("merge", *paths[:2], "--rule", "linear", "-o", tmp_path / "out.safetensors").exit_code
    assert load_file(tmp_path / "out.safetensors")["ids"].tolist() == [3]
    said = refusal("merge", *paths[1:], "--rule", "linear", "-o", tmp_path / "more.safetensors")
    assert said.startswith("ids: holds torch.int64, which is not merged, and differs between")


@pytest.mark.parametrize(
    ("value", "dtype", "reason"), [(torch.nan, "float32", "in"), (6e4, "float16", "after merging in torch.float16")]
)
def test_a_result_that_is_not_finite_is_refused(tmp_path: Path, value: float, dtype: str, reason: str) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path in paths:
        save_file({"w": torch.full((3,), value)}, path)
    said = refusal(
        "merge",
        *paths,
        "--rule",
        "linear",
        "-p",
        "normalize=false",
        "--dtype",
        dtype,
        "-o",
        tmp_path / "out.safetensors",
    )
    assert said.startswith(f"w: is infinite or not a number {reason}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_an_overlap_of_options_and_recipe(models: Path) -> None:
    recipe = write(models / "recipe.yaml", EXAMPLES["karcher"])
    assert "without it the only argument is a recipe" in refusal("merge", recipe, "--anchor", "base", "-o", "out")
    assert not fedbasin("merge", recipe, "--dtype", "bfloat16", "-o", "out").exit_code
    assert {tensor.dtype for tensor in state(models / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("gpt2", "star"),
        *(pytest.param("llama", order, marks=pytest.mark.slow) for order in ("chain", "tree", "universe")),
        pytest.param("gpt2", "universe", marks=pytest.mark.slow),
    ],
)
def test_aligned_copies_of_one_model_merge_into_it(tmp_path: Path, name: str, order: str) -> None:
    first = saved(name, tmp_path / "a")
    for copy in "bc":
        planted(name, tmp_path / copy)
    paths = [tmp_path / copy for copy in "abc"]
    (report,) = answer("merge", *paths, "--rule", "linear", "--align", order, "-o", tmp_path / "out")
    assert (outputs(name, tmp_path / "out") - outputs(name, first)).abs().max() < 1e-4
    assert all(search["distance_after"] < 1e-3 for search in report["alignments"][-2:])
    assert not fedbasin("merge", *paths, "--rule", "linear", "-o", tmp_path / "unaligned").exit_code
    assert (outputs(name, tmp_path / "unaligned") - outputs(name, first)).abs().max() > 1e-2


def tokenizer(folder: Path, words: list[str], rows: Tensor) -> Path:
    """Write a tiny model whose embeddings have one row for each word."""
    folder.mkdir()
    save_file({"model.embed_tokens.weight": rows, "w": torch.ones(2, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(rows)}))
    vocabulary = {word: place for place, word in enumerate(words)}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": words[0]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def table(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None].repeat(1, 2)


def test_embeddings_follow_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer(Path("a"), ["x", "y", "z"], table(1, 2, 3))
    tokenizer(Path("b"), ["z", "x", "y"], table(30, 10, 20))
    (report,) = answer("merge", "a", "b", "--rule", "linear", "-o", "out")
    assert state(Path("out"))["model.embed_tokens.weight"][:, 0].tolist() == [5.5, 11, 16.5]
    assert report["vocabulary"] == 3


def test_a_superset_is_chosen_and_its_tokens_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer(Path("a"), ["x", "y"], table(1, 2))
    tokenizer(Path("b"), ["x", "y", "new"], table(10, 20, 7))
    assert not fedbasin("merge", "a", "b", "--rule", "linear", "-o", "out").exit_code
    # Only b has the new token, so it takes part with b's row on both sides.
    assert state(Path("out"))["model.embed_tokens.weight"][:, 0].tolist() == [5.5, 11, 7]
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 3
    assert Path("out/tokenizer.json").read_bytes() == Path("b/tokenizer.json").read_bytes()


def test_a_model_without_a_tokenizer_among_others_that_differ_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer(Path("a"), ["x", "y"], table(1, 2))
    tokenizer(Path("b"), ["y", "x"], table(20, 10))
    tokenizer(Path("c"), ["x", "y"], table(5, 6))
    Path("c/tokenizer.json").unlink()
    said = refusal("merge", "--rule", "linear", "a", "b", "c", "-o", "out")
    assert "c: has no tokenizer.json, and those of the other models differ" in said
    # Row by row where nothing speaks against it.
    assert not fedbasin("merge", "--rule", "linear", "a", "c", "-o", "out").exit_code


def test_tokenizers_that_differ_need_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer(Path("a"), ["x", "y", "mine"], table(1, 2, 3))
    tokenizer(Path("b"), ["y", "x", "yours"], table(20, 10, 40))
    said = refusal("merge", "a", "b", "--rule", "linear", "-o", "out")
    assert "its tokenizer has 'yours', which that of a lacks; set tokenizer_source to union, base or a model" in said
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\ntokenizer_source: "
    expected = {"union": [5.5, 11, 3, 40], "base": [5.5, 11, 3], "b": [11, 5.5, 40]}
    for source, values in expected.items():
        assert not fedbasin("merge", write(tmp_path / "r.yaml", text + source), "-o", source + ".out").exit_code
        assert state(Path(source + ".out"))["model.embed_tokens.weight"][:, 0].tolist() == values
    from tokenizers import Tokenizer

    merged = Tokenizer.from_file("union.out/tokenizer.json")
    assert [merged.token_to_id(word) for word in ("x", "y", "mine", "yours")] == [0, 1, 2, 3]
    padded = text.replace("tokenizer_source: ", "tokenizer: {source: union, pad_to_multiple_of: 8}")
    assert not fedbasin("merge", write(tmp_path / "r.yaml", padded), "-o", "padded").exit_code
    assert state(Path("padded"))["model.embed_tokens.weight"][:, 0].tolist() == [5.5, 11, 3, 40, 0, 0, 0, 0]
    assert "nowhere is not a model of this merge" in refusal(
        "merge", write(tmp_path / "r.yaml", text + "nowhere"), "-o", "o"
    )


def test_a_recipe_of_options_is_the_recipe_of_keys(models: Path) -> None:
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"density": 0.3},
    }
    fedbasin("merge", write(models / "recipe.yaml", yaml.safe_dump(recipe)), "-o", "keys")
    fedbasin("merge", "a", "b", "--rule", "ties", "--anchor", "base", "-p", "density=0.3", "-o", "options")
    assert (models / "keys/model.safetensors").read_bytes() == (models / "options/model.safetensors").read_bytes()


def test_every_file_of_the_folder_is_named_as_merged_copied_or_left(tmp_path: Path) -> None:
    a, b = (llama(tmp_path / name, seed, "9KB") for seed, name in enumerate(("a", "b")))
    for folder, value in ((a, 1.0), (b, 2.0)):
        (folder / "2_Dense").mkdir()
        (folder / "2_Dense" / "config.json").write_text("{}")
        save_file({"linear.weight": torch.full((2, 2), value)}, folder / "2_Dense" / "model.safetensors")
        (folder / "pytorch_model.bin").write_bytes(b"old")
        (folder / ".cache").mkdir()
        (folder / ".cache" / "note").write_text("hidden")
    (a / "README.md").write_text("a")
    arguments = ("merge", a, b, "--rule", "linear", "-o")
    (report,) = answer(*arguments, tmp_path / "out")
    files = report["files"]
    names = {str(path.relative_to(a)) for path in a.rglob("*") if path.is_file()}
    assert sorted(names) == sorted([*files["merged"], *files["copied"], *files["left"]])
    assert {"README.md", "config.json", "2_Dense/model.safetensors"} <= set(files["copied"])
    assert files["left"] == [".cache/note", "pytorch_model.bin"]
    assert files["differing"] == ["2_Dense/model.safetensors"]
    for name in files["copied"]:
        assert (tmp_path / "out" / name).is_file()
    shown = " ".join(fedbasin(*arguments, tmp_path / "again").stdout.split())
    assert "not merged, though the models differ in it: '2_Dense/model.safetensors'" in shown
    assert "left out: '.cache/note', 'pytorch_model.bin'" in shown
