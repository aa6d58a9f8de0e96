"""Merges by statistics: equal to their formulas, to a round of the recipe of the same name, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedbasin.strategies.fusion.accumulator import Accumulator, Ridge
from fedbasin.strategies.fusion.precisions import Diagonal, Gram
from fedbasin.strategies.fusion.update import Update
from fedbasin.strategies.statistics.fisher import diagonal_fisher, normalise
from fedbasin.strategies.statistics.gram import grams
from tests.server.files import given
from tests.server.files.stored import MLP, answer, fedbasin, perceptron, planted, refusal, saved, tensors

GIVEN = "tests.server.files.given"
MODULE = ("--module", f"{GIVEN}:model")
DATA = ("--statistics", f"{GIVEN}:rows", "--statistics", f"{GIVEN}:wider_rows")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        perceptron(tmp_path / f"{seed}.safetensors", seed, {"symmetry": MLP})
    return tmp_path


def models() -> list[tuple[dict[str, Tensor], torch.nn.Module, list[tuple[Tensor, Tensor]]]]:
    result = []
    for seed, data in ((1, given.rows), (2, given.wider_rows)):
        module, _ = given.model()
        state = load_file(f"{seed}.safetensors")
        module.load_state_dict(state)
        result.append((state, module, list(data())))
    return result


def merged(rule: str, *options: object) -> dict[str, Tensor]:
    done = fedbasin("merge", "1.safetensors", "2.safetensors", "--rule", rule, *MODULE, *options, "-o", "o.safetensors")
    assert done.exit_code == 0, done.output
    return load_file("o.safetensors")


def equal(result: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor.to(result[name]), rtol=tolerance, atol=tolerance)


def test_fisher_is_the_mean_weighted_by_squared_gradients(folder: Path) -> None:
    result = merged("fisher", *DATA, "-p", "normalize=false", "-p", "ridge=0", "--weight", 1, "--weight", 3)
    above, below = {}, {}
    for weight, (state, module, rows) in zip((1, 3), models(), strict=True):
        fisher = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for inputs, _ in rows:
            for row in range(len(inputs)):
                scores = module(inputs[row : row + 1]).log_softmax(-1)[0]
                for label in range(3):
                    gradients = torch.autograd.grad(scores[label], list(module.parameters()), retain_graph=True)
                    for (name, _), gradient in zip(module.named_parameters(), gradients, strict=True):
                        fisher[name] += scores[label].exp().detach() * gradient.square()
        for name, tensor in state.items():
            above[name] = above.get(name, 0) + weight * fisher[name] * tensor
            below[name] = below.get(name, 0) + weight * fisher[name]
    equal(result, {name: above[name] / below[name] for name in above}, 1e-4)


def test_regmean_is_least_squares_on_the_outputs_of_all(folder: Path) -> None:
    result = merged("regmean", *DATA, "-p", "ridge=0")
    gram, moment = torch.zeros(5, 5), torch.zeros(5, 6)
    for state, _, rows in models():
        inputs = torch.cat([x for x, _ in rows])
        ones = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
        gram += ones.T @ ones
        moment += ones.T @ ones @ torch.cat([state["0.weight"], state["0.bias"][:, None]], dim=1).T
    solution = torch.linalg.solve(gram, moment).T
    torch.testing.assert_close(result["0.weight"], solution[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result["0.bias"], solution[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["fisher", "regmean"])
def test_files_are_merged_as_a_round_merges_clients(rule: str, folder: Path) -> None:
    total = Accumulator.zero(load_file("1.safetensors"))
    for state, module, rows in models():
        if rule == "fisher":
            values = diagonal_fisher(module, rows, torch.Generator().manual_seed(0))
            precisions = {(name,): Diagonal(normalise(value, 1.0)) for name, value in values.items()}
        else:
            precisions = {block: Gram(matrix) for block, matrix in grams(module, rows).items()}
        total.add(Update(state, 1.0, precisions))
    equal(merged(rule, *DATA), total.finalize(load_file("1.safetensors"), Ridge(1e-3)))


def test_the_first_layer_of_regmean_in_order_is_that_of_regmean(folder: Path) -> None:
    at_once, in_order = merged("regmean", *DATA), None
    Path("o.safetensors").unlink()
    in_order = merged("regmean++", *DATA)
    equal({"0.weight": in_order["0.weight"]}, {"0.weight": at_once["0.weight"]})
    assert not torch.allclose(in_order["2.weight"], at_once["2.weight"], atol=1e-4)
    # The second layer is solved for on what the merged first layer computes.
    gram, moment = torch.zeros(7, 7, dtype=torch.float64), torch.zeros(7, 3, dtype=torch.float64)
    for state, _, rows in models():
        inputs = torch.cat([x for x, _ in rows]) @ in_order["0.weight"].T + in_order["0.bias"]
        ones = torch.cat([inputs.relu(), torch.ones(len(inputs), 1)], dim=1).double()
        gram += ones.T @ ones
        moment += ones.T @ ones @ torch.cat([state["2.weight"], state["2.bias"][:, None]], dim=1).T.double()
    mean = (load_file("1.safetensors")["2.weight"] + load_file("2.safetensors")["2.weight"]) / 2
    bias = (load_file("1.safetensors")["2.bias"] + load_file("2.safetensors")["2.bias"]) / 2
    prior = 1e-3 * gram.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    target = torch.cat([mean, bias[:, None]], dim=1).T.double()
    solution = torch.linalg.solve(gram + prior, moment + prior @ target).T
    torch.testing.assert_close(in_order["2.weight"].double(), solution[:, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["fisher", "regmean", "regmean++"])
def test_equal_models_are_their_merge(rule: str, folder: Path) -> None:
    save_file(load_file("1.safetensors"), "2.safetensors")
    equal(merged(rule, *DATA), load_file("1.safetensors"), 1e-4)


@pytest.mark.parametrize("rule", ["fisher", "regmean"])
def test_statistics_are_those_of_the_aligned_models(rule: str, folder: Path) -> None:
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    state = load_file("1.safetensors")
    permuted = {"0.weight": state["0.weight"][order], "0.bias": state["0.bias"][order], "2.bias": state["2.bias"]}
    save_file({**permuted, "2.weight": state["2.weight"][:, order].contiguous()}, "2.safetensors", {"symmetry": MLP})
    equal(merged(rule, *DATA, "--align", "star"), state, 1e-4)


def test_a_folder_is_run_as_its_config_says(folder: Path) -> None:
    saved("gpt2", folder / "a")
    planted("gpt2", folder / "b", "9KB")
    arguments = ("--statistics", f"{GIVEN}:tokens", "--align", "star")
    (report,) = answer("merge", "a", "b", "--rule", "regmean", *arguments, "--dtype", "bfloat16", "-o", "out")
    assert report["alignments"][0]["distance_after"] < 1e-3
    equal(tensors(folder / "out"), tensors(folder / "a"), 1e-2)
    assert {tensor.dtype for tensor in tensors(folder / "out").values() if tensor.is_floating_point()} == {
        torch.bfloat16
    }


def collected(model: str, kind: str, function: str, output: str) -> dict[str, Any]:
    data = f"{GIVEN}:{function}"
    (record,) = answer("statistics", model, "--data", data, "--kind", kind, *MODULE, "-o", output)
    return record


@pytest.mark.parametrize(
    ("rule", "kind", "options"),
    [
        ("fisher", "fisher", ["-p", "normalize=false"]),
        ("fisher", "fisher", ["--weight", "1", "--weight", "2"]),
        ("regmean", "gram", ["-p", "shrink=0.5"]),
    ],
)
def test_a_file_of_statistics_gives_what_its_data_give(rule: str, kind: str, options: list[str], folder: Path) -> None:
    expected = merged(rule, *DATA, *options)
    Path("o.safetensors").unlink()
    record = collected("1.safetensors", kind, "rows", "a.safetensors")
    assert record["layers"] == (2 if kind == "gram" else 4)
    assert record["bytes"] == Path("a.safetensors").stat().st_size
    collected("2.safetensors", kind, "wider_rows", "b.safetensors")
    mixed = ("--statistics", "a.safetensors", "--statistics", f"{GIVEN}:wider_rows")
    for given_data in (("--statistics", "a.safetensors", "--statistics", "b.safetensors"), mixed):
        equal(merged(rule, *given_data, *options), expected, 0)
        Path("o.safetensors").unlink()


def test_statistics_of_a_folder_are_in_the_names_that_its_library_gives(folder: Path) -> None:
    saved("gpt2", folder / "a")
    planted("gpt2", folder / "b", "9KB")
    for name in "ab":
        answer("statistics", name, "--data", f"{GIVEN}:tokens", "-o", f"{name}.safetensors")
    merge = ("merge", "a", "b", "--rule", "regmean")
    answer(*merge, "--statistics", f"{GIVEN}:tokens", "-o", "data")
    answer(*merge, "--statistics", "a.safetensors", "--statistics", "b.safetensors", "-o", "files")
    equal(tensors(folder / "files"), tensors(folder / "data"), 0)
    # Heads of attention read one input, whose matrix is stored once.
    assert Path("a.safetensors").stat().st_size < sum(t.nbytes for t in tensors(folder / "a").values()) * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule", "fisher", "--statistics", "a.safetensors"], "holds gram, and fisher needs fisher"),
        (["--rule", "regmean", "--statistics", "a.safetensors"], "was collected on another model than 2.safetensors"),
        (["--rule", "regmean", "--statistics", "1.safetensors"], "holds no statistics"),
        (["--rule", "regmean", "--statistics", "no.safetensors"], "no.safetensors: cannot be read"),
        (["--rule", "regmean++", "--statistics", "a.safetensors"], "runs the merged layers on data"),
        (["--rule", "regmean", "--statistics", "a.safetensors", "--align", "star"], "before it is aligned"),
        (["--rule", "regmean", *DATA, "--task", "classification"], "task: is read only where Fisher"),
        (["--rule", "fisher", "--statistics", "a.safetensors", "--task", "classification"], "task: is read only"),
    ],
)
def test_files_of_statistics_that_are_refused(options: list[str], words: str, folder: Path) -> None:
    collected("1.safetensors", "gram", "rows", "a.safetensors")
    assert words in refusal("merge", "1.safetensors", "2.safetensors", *MODULE, *options, "-o", "o.safetensors")
    assert not Path("o.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", f"{GIVEN}:rows", "-o", "1.safetensors", "--force"], "is 1.safetensors itself"),
        (["--data", f"{GIVEN}:rows", "-o", "2.safetensors"], "is there already"),
        (["--data", f"{GIVEN}:rows", "-o", "a"], "end it with .safetensors"),
        (["--data", f"{GIVEN}:rows", "-o", "a.safetensors", "--task", "classification"], "do not depend on it"),
        (["--data", f"{GIVEN}:wide", "-o", "a.safetensors"], "cannot be evaluated on it"),
        (["--data", f"{GIVEN}:nothing", "-o", "a.safetensors"], "returns no batches"),
    ],
)
def test_statistics_that_cannot_be_collected(options: list[str], words: str, folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    assert words in refusal("statistics", "1.safetensors", *MODULE, *options)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_statistics_of_a_model_that_is_not_finite_are_refused(folder: Path) -> None:
    state = load_file("1.safetensors")
    save_file({**state, "0.bias": state["0.bias"] / 0}, "1.safetensors")
    words = refusal("statistics", "1.safetensors", *MODULE, "--data", f"{GIVEN}:rows", "-o", "a.safetensors")
    assert "'0.bias' has entries that are infinite" in words


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        ("regmean", [], "needs data of every model"),
        ("regmean", ["--statistics", "a", "--statistics", "b", "--statistics", "c"], "given 3 times for 2 models"),
        ("regmean", ["--statistics", f"{GIVEN}:wide"], "cannot be evaluated on it"),
        (
            "regmean",
            ["--statistics", f"{GIVEN}:rows", "--statistics", f"{GIVEN}:wide"],
            f"--statistics {GIVEN}:rows, {GIVEN}:wide: Sequential cannot be evaluated on it",
        ),
        ("regmean", ["--statistics", f"{GIVEN}:lost"], "has no attribute 'lost'"),
        ("fisher", [*DATA, "--weight", "-1", "--weight", "1"], "give no negative number"),
        ("regmean", [*DATA, "-p", "ridge=-1"], "give no negative number"),
        ("regmean", [*DATA, "-p", "shrink=2"], "shrink is 2; it is a fraction, from 0 to 1"),
        ("linear", ["--statistics", f"{GIVEN}:rows"], "linear reads no data"),
        ("linear", [], "module out"),
        ("fisher", [*DATA, "-p", "shrink=0.5"], "has no parameter 'shrink'"),
        ("fisher", [*DATA, "--task", "colours"], "--task colours: is unknown"),
        ("fisher", [*DATA, "-p", "ridge=[{filter: bias, value: 1}, {value: 0}]"], "one value of each parameter"),
    ],
)
def test_what_is_refused(rule: str, options: list[str], words: str, folder: Path) -> None:
    merge = ("merge", "1.safetensors", "2.safetensors", "--rule", rule, *MODULE, *options, "-o", "o.safetensors")
    assert words in refusal(*merge)
    assert not Path("o.safetensors").exists()
