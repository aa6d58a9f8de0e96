"""`fedbasin merge --score`: scores of models and result, greedy soups, and searches that can be interrupted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.server.files import given
from tests.server.files.stored import MLP, answer, fedbasin, perceptron, refusal

GIVEN = "tests.server.files.given"
SCORE = ("--score", f"{GIVEN}:closeness")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(given, "calls", 0)
    target = load_file(perceptron(tmp_path / "target.safetensors", 0, {"symmetry": MLP}))
    for name, size in (("near", 0.1), ("far", 3.0), ("middle", 0.5)):
        generator = torch.Generator().manual_seed(len(name))
        noisy = {key: t + size * torch.randn(t.shape, generator=generator) for key, t in target.items()}
        save_file(noisy, tmp_path / f"{name}.safetensors", {"symmetry": MLP})
    return tmp_path


FILES = ("near.safetensors", "far.safetensors", "middle.safetensors")


def closeness(path: str) -> float:
    return given.closeness(Path(path))


def test_models_and_result_are_scored(folder: Path) -> None:
    (report,) = answer("merge", *FILES, "--rule", "linear", *SCORE, "-o", "out.safetensors")
    scores = report["score"]
    assert scores["models"] == {name: pytest.approx(closeness(name)) for name in FILES}
    assert scores["result"] == pytest.approx(closeness("out.safetensors"))
    assert "of the result" in fedbasin("merge", *FILES, "--rule", "linear", *SCORE, "-o", "two.safetensors").stdout
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*FILES, "target.safetensors", "out.safetensors", "two.safetensors"]
    )


def test_a_greedy_soup_takes_what_raises_the_score(folder: Path) -> None:
    (report,) = answer("merge", *FILES, "--rule", "greedy_soup", *SCORE, "-o", "out.safetensors")
    chosen = report["score"]["chosen"]["models"]
    assert chosen[0] == "near.safetensors"
    assert "far.safetensors" not in chosen
    assert report["score"]["result"] >= max(report["score"]["models"].values())
    states = [load_file(name) for name in chosen]
    for name, tensor in load_file("out.safetensors").items():
        torch.testing.assert_close(tensor, sum(state[name] for state in states) / len(states))


def test_a_search_is_no_worse_than_its_start_and_goes_on_from_its_log(folder: Path) -> None:
    merge = ("merge", *FILES[:2], "--rule", "linear", *SCORE, "--search-points", 1)
    (whole,) = answer(*merge, "--search", 9, "-o", "whole.safetensors")
    lines = [json.loads(line) for line in Path("whole.safetensors.search.jsonl").read_text().splitlines()]
    scores = [line["score"] for line in lines[1:]]
    assert lines[1]["coefficients"] == [1.0, 1.0]
    assert len(scores) == whole["score"]["trials"] == 9
    assert whole["score"]["result"] == pytest.approx(max(scores), abs=1e-6)
    assert max(scores) > scores[0]
    # An interrupted one: some trials are in the log, the last one cut off.
    assert not fedbasin(*merge, "--search", 4, "-o", "part.safetensors").exit_code
    log = Path("part.safetensors.search.jsonl")
    log.write_text(log.read_text() + '{"coeff')
    given.calls = 0
    (part,) = answer(*merge, "--search", 9, "-o", "part.safetensors", "--force")
    # Both models, five candidates, and the result.
    assert given.calls == 2 + 5 + 1
    assert part["score"]["result"] == whole["score"]["result"]
    assert log.read_text() == Path("whole.safetensors.search.jsonl").read_text()


def test_t_is_searched_by_layer(folder: Path) -> None:
    merge = ("merge", "far.safetensors", "--rule", "slerp", "--anchor", "near.safetensors", *SCORE)
    (report,) = answer(*merge, "--search", 6, "--search-points", 2, "-o", "out.safetensors")
    assert len(report["score"]["chosen"]["parameters"]["t"]) == 2


def test_models_are_aligned_once_for_all_candidates(folder: Path) -> None:
    merge = ("merge", *FILES, "--rule", "greedy_soup", *SCORE, "--align", "star", "-o", "out.safetensors")
    assert len(answer(*merge)[0]["alignments"]) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule", "linear", "--search", "3"], "give --score"),
        (["--rule", "linear", *SCORE, "--search-points", "3"], "belongs to --search"),
        (["--rule", "linear", *SCORE, "--search", "3", "--weight", "0"], "given 1 times for 3 models"),
        (["--rule", "greedy_soup"], "chooses models by their scores"),
        (["--rule", "linear", "--score", f"{GIVEN}:fails_on"], "OSError: no such disk"),
        (["--rule", "linear", "--score", f"{GIVEN}:ends"], "SystemExit: 3"),
        (["--rule", "linear", "--score", f"{GIVEN}:not_a_number"], "returned nan"),
        (["--rule", "linear", "--score", f"{GIVEN}:lost"], "has no attribute 'lost'"),
        (["--rule", "karcher", *SCORE, "--search", "3", "-p", "weight=[0, 1]"], "from which no search starts"),
    ],
)
def test_what_is_refused(options: list[str], words: str, folder: Path) -> None:
    assert words in refusal("merge", *FILES, *options, "-o", "out.safetensors")
    assert not Path("out.safetensors").exists()
    assert not list(folder.glob(".*"))


def test_a_log_of_another_search_is_refused(folder: Path) -> None:
    merge = ("merge", *FILES[:2], "--rule", "linear", *SCORE, "--search", 2, "-o", "out.safetensors")
    assert not fedbasin(*merge).exit_code
    assert "is of another recipe" in refusal(*merge, "--force", "--search-points", 2)
    Path("out.safetensors.search.jsonl").write_text("{}\n")
    assert "is no log of a search" in refusal(*merge, "--force")
