"""`fedbasin merge --align` with every matcher and every order, with data, and what it refuses."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedbasin.server.files.data import stored_matching
from fedbasin.strategies.alignment import learned_matching
from fedbasin.strategies.alignment.matchers import Matcher
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.transform import random
from tests.server.files import given
from tests.server.files.stored import answer, fedbasin, planted, refusal, saved
from tests.server.files.stored import outputs as library_outputs
from tests.strategies.symmetry.tiny_transformers import symmetry_of as library_symmetry

LINKS = ("star", "chain", "tree", "universe")
GIVEN = "tests.server.files.given"
MODULE = ("--module", f"{GIVEN}:model")
DATA = ("--align-data", f"{GIVEN}:rows")
ROWS = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))


def data_of(matcher: Matcher) -> tuple[str, ...]:
    return DATA if matcher.reads_data else ()


def network(kind: str = "model", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module, _ = getattr(given, kind)()
    for layer in module:
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.uniform_(layer.weight, 0.5, 2)
            layer.running_mean, layer.running_var = torch.randn(6), torch.rand(6) + 0.5
    return module.eval()


def copies(folder: Path, kind: str = "model", count: int = 3) -> list[Path]:
    """Write a model and copies of it whose units have other orders."""
    folder.mkdir(exist_ok=True)
    module, example = network(kind), getattr(given, kind)()[1]
    symmetry, state = discover(module, example).symmetry, module.state_dict()
    paths = [folder / f"{number}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        transform = random(symmetry, torch.Generator().manual_seed(number))
        save_file({**state, **transform.act(state)} if number else state, path)
    return paths


def unrelated(folder: Path, kind: str = "model", count: int = 2) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        save_file(network(kind, number).state_dict(), path)
    return paths


def outputs(path: Path, kind: str = "model") -> Tensor:
    module = network(kind)
    module.load_state_dict(load_file(path))
    with torch.no_grad():
        return module(ROWS)


SAMPLE = {(Matcher.weights, "universe"), (Matcher.graph, "tree"), (Matcher.activations, "chain")}


@pytest.mark.parametrize(
    ("matcher", "links"),
    [
        pytest.param(matcher, links, marks=() if (matcher, links) in SAMPLE else pytest.mark.slow)
        for matcher in Matcher
        if matcher is not Matcher.learned
        for links in LINKS
    ],
)
def test_copies_in_other_orders_merge_into_the_model(tmp_path: Path, matcher: Matcher, links: str) -> None:
    paths, out = copies(tmp_path), tmp_path / "out.safetensors"
    chosen = ("--align", links, "--matcher", matcher.name, *data_of(matcher))
    (report,) = answer("merge", *paths, "--rule", "linear", *chosen, *MODULE, "-o", out)
    torch.testing.assert_close(outputs(out), outputs(paths[0]), rtol=1e-4, atol=1e-5)
    assert report["change"] < 1e-8
    assert len(report["alignments"]) >= 2


@pytest.mark.parametrize(
    "links", [pytest.param(links, marks=() if links == "tree" else pytest.mark.slow) for links in LINKS]
)
def test_learned_models_keep_their_functions_and_merge_again_to_the_same(
    tmp_path: Path, links: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_matching, "Search", partial(learned_matching.Search, steps=20))
    paths, out = unrelated(tmp_path), tmp_path / "out.safetensors"
    command = ("merge", *paths, "--rule", "linear", "--align", links, "--matcher", "learned", *DATA, *MODULE)
    (report,) = answer(*command, "-o", out)
    assert report["change"] < 1e-8
    answer(*command, "--no-prove", "-o", tmp_path / "again.safetensors")
    first, second = load_file(out), load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", ("--matcher", "activations", "--align-data", f"{GIVEN}:tokens")),
        pytest.param("gpt2", ("--matcher", "activations", "--align-data", f"{GIVEN}:tokens"), marks=pytest.mark.slow),
        pytest.param("llama", ("--matcher", "graph", "--rotate-residual"), marks=pytest.mark.slow),
    ],
)
def test_copies_of_a_folder_merge_into_the_model(tmp_path: Path, name: str, options: tuple[str, ...]) -> None:
    first = saved(name, tmp_path / "a")
    for copy in "bc":
        planted(name, tmp_path / copy)
    paths = [tmp_path / copy for copy in "abc"]
    (report,) = answer("merge", *paths, "--rule", "linear", "--align", "chain", *options, "-o", tmp_path / "out")
    assert (library_outputs(name, tmp_path / "out") - library_outputs(name, first)).abs().max() < 1e-3
    assert report["change"] < 1e-8


@pytest.mark.parametrize("matcher", ["weights", "activations"])
def test_running_statistics_are_those_of_the_merged_model_on_the_data(tmp_path: Path, matcher: str) -> None:
    paths, out = unrelated(tmp_path, "normed"), tmp_path / "out.safetensors"
    chosen = ("--align", "star", "--matcher", matcher, *DATA, "--module", f"{GIVEN}:normed")
    answer("merge", *paths, "--rule", "linear", *chosen, "-o", out)
    state = load_file(out)
    inputs = torch.cat([batch for batch, _ in given.rows()]) @ state["0.weight"].T + state["0.bias"]
    torch.testing.assert_close(state["1.running_mean"], inputs.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state["1.running_var"], inputs.var(0, correction=0), rtol=1e-4, atol=1e-5)


def test_models_that_are_scored_alone_keep_their_running_statistics(tmp_path: Path) -> None:
    paths, out = unrelated(tmp_path, "normed"), tmp_path / "out.safetensors"
    shutil.copy(paths[0], tmp_path / "target.safetensors")
    chosen = ("--align", "star", *DATA, "--module", f"{GIVEN}:normed", "--score", f"{GIVEN}:closeness")
    (report,) = answer("merge", *paths, "--rule", "greedy_soup", *chosen, "-o", out)
    assert report["score"]["models"][str(paths[0])] == 0
    assert all(torch.equal(tensor, load_file(paths[0])[name]) for name, tensor in load_file(out).items())


def test_a_recipe_has_the_same_keys(tmp_path: Path) -> None:
    a, b = unrelated(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    keys = f"{{links: chain, matcher: activations, data: {GIVEN}:rows, prove: false}}"
    recipe.write_text(
        f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\nalign: {keys}\nmodule: {GIVEN}:model\n"
    )
    (report,) = answer("merge", recipe, "-o", tmp_path / "x.safetensors")
    assert report["change"] is None
    chosen = ("--align", "chain", "--matcher", "activations", *DATA)
    answer("merge", a, b, "--rule", "linear", *chosen, *MODULE, "-o", tmp_path / "y.safetensors")
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "xy")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("switch", ["off", "'off'"])
def test_off_aligns_nothing(tmp_path: Path, switch: str) -> None:
    a, b = unrelated(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\nalign: {switch}\n")
    (report,) = answer("merge", recipe, "-o", tmp_path / "out.safetensors")
    assert report["alignments"] == []


def test_the_proof_is_printed(tmp_path: Path) -> None:
    done = fedbasin(
        "merge", *copies(tmp_path), "--rule", "linear", "--align", "star", *MODULE, "-o", tmp_path / "o.safetensors"
    )
    assert "proven by execution: outputs change by" in done.stdout


REFUSED = {
    "no data": (("--align", "star", "--matcher", "activations", *MODULE), "data: the matcher activations reads data"),
    "no data to learn on": (("--align", "tree", "--matcher", "learned", *MODULE), "the matcher learned reads data"),
    "idle data": (("--align", "star", *DATA, *MODULE), "weights reads no data, and the models have no BatchNorm"),
    "idle data of a graph": (("--align", "star", "--matcher", "graph", *DATA, *MODULE), "graph reads no data"),
    "no matcher": (("--align", "star", "--matcher", "guess", *MODULE), "align.matcher: Input should be 'weights'"),
    "no links": (("--align", "ring", *MODULE), "align.links: Input should be 'star'"),
    "matcher alone": (("--matcher", "graph"), "--matcher: belongs to --align"),
    "data alone": (DATA, "--align-data: belongs to --align"),
    "off with a matcher": (("--align", "off", "--matcher", "graph"), "--matcher: belongs to --align"),
    "no proof of nothing": (("--no-prove",), "--no-prove: belongs to --align"),
    "no stream to rotate": (("--align", "star", "--rotate-residual", *MODULE), "residual stream"),
    "no rotation of nothing": (("--rotate-residual",), "--rotate-residual: belongs to --align"),
    "idle smoothing": (
        ("--align", "star", "--smoothing", "0", *MODULE),
        "--smoothing 0: is from 0 to below 1, and read",
    ),
    "idle steps": (
        ("--align", "star", "--steps", "9", *MODULE),
        "--steps 9: are 1 or more, and read by the matcher learned",
    ),
    "no steps": (
        ("--align", "star", "--matcher", "learned", "--steps", "0", *DATA, *MODULE),
        "--steps 0: are 1 or more",
    ),
    "steps alone": (("--steps", "9"), "--steps: belongs to --align"),
    "smoothing of 1": (
        ("--align", "star", "--matcher", "learned", "--smoothing", "1", *DATA, *MODULE),
        "--smoothing 1: is from 0 to below 1",
    ),
    "smoothing alone": (("--smoothing", "0"), "--smoothing: belongs to --align"),
    "no module": (("--align", "star", "--matcher", "activations", *DATA), "has no symmetry in its metadata"),
    "a task that is not read": (("--align", "star", *MODULE, "--task", "classification"), "task: is read only"),
    "a module that is not run": (MODULE, "module: is run only by"),
    "data that do not fit": (
        ("--align", "star", "--matcher", "activations", "--align-data", f"{GIVEN}:wide", *MODULE),
        "cannot be evaluated on it",
    ),
    "nothing as data": (
        ("--align", "star", "--matcher", "learned", "--align-data", f"{GIVEN}:nothing", *MODULE),
        "returns no batches",
    ),
    "unlabelled data": (
        ("--align", "star", "--matcher", "learned", "--align-data", f"{GIVEN}:inputs", *MODULE),
        "cannot be evaluated on it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path: Path, case: str) -> None:
    options, message = REFUSED[case]
    paths = unrelated(tmp_path)
    assert message in refusal("merge", *paths, "--rule", "linear", *options, "-o", tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == paths


def test_batches_of_one_example_have_no_variance(tmp_path: Path) -> None:
    paths = unrelated(tmp_path, "normed")
    options = ("--align", "star", "--align-data", f"{GIVEN}:single_rows", "--module", f"{GIVEN}:normed")
    said = refusal("merge", *paths, "--rule", "linear", *options, "-o", tmp_path / "out.safetensors")
    assert "every batch has one example" in said


@pytest.mark.parametrize("matcher", [m for m in Matcher if m is not Matcher.learned])
def test_one_model_is_aligned_by_every_matcher(tmp_path: Path, matcher: Matcher) -> None:
    anchor, model = copies(tmp_path, count=2)
    out = tmp_path / "out.safetensors"
    data = ("--data", f"{GIVEN}:rows") if matcher.reads_data else ()
    answer("align", model, "--anchor", anchor, "--matcher", matcher.name, *data, *MODULE, "-o", out)
    first, second = load_file(anchor), load_file(out)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_the_line_to_a_model_that_learned_its_alignment_has_no_higher_loss_than_to_the_one_by_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_matching, "Search", partial(learned_matching.Search, steps=20))
    command = ("barrier", *unrelated(tmp_path), "--data", f"{GIVEN}:rows", "--points", 3, *MODULE)
    (by_weights,), (learned,) = answer(*command), answer(*command, "--matcher", "learned", "--smoothing", 0, *DATA)
    assert learned["after"]["loss"][1] <= by_weights["after"]["loss"][1] + 1e-6
    assert learned["before"] == by_weights["before"]


ALONE = {
    "align, no data": (("align", "--matcher", "activations"), "--matcher activations: reads data; give --data"),
    "align, idle data": (("align", "--data", f"{GIVEN}:rows"), "--data: the matcher weights reads no data"),
    "align, idle task": (("align", "--task", "classification"), "--task: is read by the matcher learned alone"),
    "align, unknown": (("align", "--matcher", "guess"), "--matcher guess: is unknown; give one of weights"),
    "align, certified": (
        ("align", "--matcher", "learned", "--data", f"{GIVEN}:rows", "--certify"),
        "--certify: is a proof about weights",
    ),
    "barrier, no data": (("barrier", "--matcher", "learned"), "--matcher learned: reads data; give --align-data"),
    "barrier, idle data": (("barrier", *DATA), "--align-data: the matcher weights reads no data"),
}


@pytest.mark.parametrize("case", ALONE)
def test_what_other_commands_refuse(tmp_path: Path, case: str) -> None:
    (command, *options), message = ALONE[case]
    anchor, model = unrelated(tmp_path)
    rest = {
        "align": (model, "--anchor", anchor, "-o", "o.safetensors"),
        "barrier": (anchor, model, "--data", f"{GIVEN}:rows"),
    }
    assert message in refusal(command, *rest[command], *options, *MODULE)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_tokens_that_a_model_lacks_are_those_of_the_aligned_model(tmp_path: Path, tied: bool) -> None:
    """The second model is the first with units in another order, and without its last two tokens."""
    words = ["unknown", *"abcdefgh"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=len(words), tie_word_embeddings=tied)
    model = LlamaForCausalLM(config)
    fewer = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "vocab_size": len(words) - 2}))
    state = random(library_symmetry(model), torch.Generator().manual_seed(1)).act(model.state_dict())
    fewer.load_state_dict({n: t[: len(words) - 2] if len(t) == len(words) else t for n, t in state.items()})
    for folder, kind, count in (("a", model, len(words)), ("b", fewer, len(words) - 2)):
        kind.save_pretrained(tmp_path / folder)
        vocabulary = {word: place for place, word in enumerate(words[:count])}
        tokenizer = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "unknown"}
        text = json.dumps({"version": "1.0", "added_tokens": [], "model": tokenizer})
        (tmp_path / folder / "tokenizer.json").write_text(text)
    recipe = tmp_path / "recipe.yaml"
    a, b, out = (tmp_path / name for name in ("a", "b", "out"))
    sources = f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]"
    recipe.write_text(f"{sources}\ntokenizer_source: union\nalign: star\n")
    answer("merge", recipe, "-o", out)
    first, merged = load_file(a / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.allclose(first[name], merged[name], atol=1e-4) for name in first)
