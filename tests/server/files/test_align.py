import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.server.files.stored import MLP, answer, fedbasin, outputs, perceptron, planted, refusal, saved, tensors


def distance(a: Path, b: Path) -> float:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


@pytest.mark.parametrize("shard", ["1GB", "4KB"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "qwen2_tied", "vit"])
def test_a_planted_transform_is_undone_and_the_function_kept(name: str, shard: str, tmp_path: Path) -> None:
    anchor, model, out = saved(name, tmp_path / "a"), tmp_path / "b", tmp_path / "out"
    planted(name, model, shard)
    (report,) = answer("align", model, "--anchor", anchor, "-o", out)
    assert report["distance_after"] < 1e-4 < 1 < report["distance_before"]
    assert distance(anchor, out) < 1e-4
    assert (outputs(name, out) - outputs(name, model)).abs().max() < 1e-4


def test_each_space_says_how_it_went(tmp_path: Path) -> None:
    anchor, model = saved("bert", tmp_path / "a"), tmp_path / "b"
    planted("bert", model)
    done = fedbasin("align", model, "--anchor", anchor, "-o", tmp_path / "out", "--certify")
    assert done.exit_code == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["space", "moved", "gain", "certified"]
    assert {row[0].rpartition(".")[2] for row in rows[1:6]} == {"word_embeddings", "query", "dense"}
    assert "distance to the anchor 28." in done.stdout
    assert "proven by execution: outputs change by " in done.stdout
    assert done.stderr == ""


def test_a_model_near_its_anchor_is_certified_and_written_as_it_was(tmp_path: Path) -> None:
    anchor = perceptron(tmp_path / "a.safetensors", metadata={"symmetry": MLP})
    state = {name: tensor + 1e-3 for name, tensor in load_file(anchor).items()}
    save_file(state, tmp_path / "b.safetensors", {"symmetry": MLP})
    out = tmp_path / "out.safetensors"
    (report,) = answer("align", tmp_path / "b.safetensors", "--anchor", anchor, "-o", out, "--certify")
    assert report["spaces"][0]["certified"]
    assert out.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def header(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def test_the_layout_stays(tmp_path: Path) -> None:
    anchor, model, out = saved("llama", tmp_path / "a"), tmp_path / "b", tmp_path / "out"
    planted("llama", model, "4KB")
    (model / "tokenizer.json").write_text("{}")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("[]")
    assert fedbasin("align", model, "--anchor", anchor, "-o", out).exit_code == 0
    names = sorted(str(path.relative_to(model)) for path in model.rglob("*"))
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == names
    for name in names:
        if name.endswith(".safetensors"):
            assert header(out / name) == header(model / name)
        elif (model / name).is_file():
            assert (out / name).read_bytes() == (model / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_weights_of_other_formats_are_left_out_because_they_did_not_move(tmp_path: Path) -> None:
    anchor, model, out = saved("llama", tmp_path / "a"), tmp_path / "b", tmp_path / "out"
    planted("llama", model)
    (model / "pytorch_model.bin").write_bytes(b"old")
    (model / "original").mkdir()
    (model / "original" / "consolidated.pth").write_bytes(b"old")
    done = fedbasin("align", model, "--anchor", anchor, "-o", out)
    assert done.exit_code == 0
    assert "pytorch_model.bin holds other weights and was left out" in done.stderr
    assert "original/consolidated.pth holds other weights" in done.stderr
    assert not list(out.rglob("*.bin")) + list(out.rglob("*.pth"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays(tmp_path: Path, dtype: torch.dtype) -> None:
    anchor, model, out = saved("bert", tmp_path / "a", dtype=dtype), tmp_path / "b", tmp_path / "o"
    planted("bert", model, dtype=dtype)
    (report,) = answer("align", model, "--anchor", anchor, "-o", out)
    assert {tensor.dtype for tensor in tensors(out).values()} == {dtype}
    assert report["distance_after"] < 0.01 * report["distance_before"]


def test_metadata_and_integers_stay(tmp_path: Path) -> None:
    metadata = {"symmetry": MLP, "round": "3"}
    anchor = perceptron(tmp_path / "a.safetensors", metadata=metadata)
    for path in (anchor, tmp_path / "b.safetensors"):
        state = load_file(anchor) | {"steps": torch.tensor(7), "mask": torch.tensor([True, False])}
        save_file(state, path, metadata)
    out = tmp_path / "out.safetensors"
    answer("align", tmp_path / "b.safetensors", "--anchor", anchor, "-o", out)
    with safe_open(out, "pt") as file:
        assert file.metadata() == metadata
    assert int(load_file(out)["steps"]) == 7


def test_only_the_chosen_spaces_move(tmp_path: Path) -> None:
    anchor, model, out = saved("llama", tmp_path / "a"), tmp_path / "b", tmp_path / "out"
    planted("llama", model)
    (report,) = answer("align", model, "--anchor", anchor, "-o", out, "--layers", "*.mlp.*", "--last", 1)
    assert [space["space"] for space in report["spaces"]] == ["model.layers.1.mlp.gate_proj"]
    before, after = tensors(model), tensors(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert (outputs("llama", out) - outputs("llama", model)).abs().max() < 1e-4


def test_a_transform_is_saved_applied_and_undone(tmp_path: Path) -> None:
    anchor, model, out = saved("llama", tmp_path / "a"), tmp_path / "b", tmp_path / "out"
    planted("llama", model)
    transform, again, back = tmp_path / "t", tmp_path / "again", tmp_path / "back"
    answer("align", model, "--anchor", anchor, "-o", out, "--transform", transform)
    assert fedbasin("apply", transform, model, "-o", again).exit_code == 0
    assert distance(out, again) < 1e-5
    assert fedbasin("apply", transform, out, "-o", back, "--inverse").exit_code == 0
    assert distance(model, back) < 1e-5


def test_threads_are_what_was_asked_for(tmp_path: Path) -> None:
    held = torch.get_num_threads()
    try:
        anchor = perceptron(tmp_path / "a.safetensors", metadata={"symmetry": MLP})
        options = ("--anchor", anchor, "-o", tmp_path / "out.safetensors", "--threads", 1)
        answer("align", perceptron(tmp_path / "b.safetensors", 1, {"symmetry": MLP}), *options)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(held)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """An anchor and a model in one file each."""
    metadata = {"symmetry": MLP}
    return (perceptron(tmp_path / "a.safetensors", 0, metadata), perceptron(tmp_path / "b.safetensors", 1, metadata))


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(path) | tensors
    save_file({k: v for k, v in state.items() if v is not None}, path, {"symmetry": MLP})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": torch.zeros(1)}, "has no tensor 'extra', but"),
        ({"2.bias": None}, "has no tensor '2.bias', but"),
        ({"2.bias": torch.zeros(4)}, "has other shapes than"),
        ({"2.bias": torch.tensor([0, torch.nan, 0])}, "'2.bias' has entries that are infinite"),
        ({"0.weight": torch.full((6, 4), torch.inf)}, "'0.weight' has entries that are infinite"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_two_models_that_do_not_go_together_are_refused(
    pair: tuple[Path, Path], which: int, changes: dict[str, torch.Tensor], message: str
) -> None:
    change(pair[which], **changes)
    anchor, model = pair
    out = model.with_name("out.safetensors")
    assert message in refusal("align", model, "--anchor", anchor, "-o", out)
    assert not out.exists()


def test_shapes_that_differ_are_named(pair: tuple[Path, Path]) -> None:
    anchor, model = pair
    change(model, **{"2.bias": torch.zeros(4)})
    said = refusal("align", model, "--anchor", anchor, "-o", model.with_name("out.safetensors"))
    assert "'2.bias (4,) for (3,)'" in said


def test_configs_that_differ_are_named(tmp_path: Path) -> None:
    anchor, model = saved("bert", tmp_path / "a"), saved("bert", tmp_path / "b")
    config = model / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 3', '"num_attention_heads": 6'))
    said = refusal("align", model, "--anchor", anchor, "-o", tmp_path / "out")
    assert "are of two architectures: their configs differ in 'num_attention_heads'" in said


def test_nothing_is_replaced_without_being_told_to(pair: tuple[Path, Path]) -> None:
    anchor, model = pair
    out = model.with_name("out.safetensors")
    out.write_text("mine")
    said = refusal("align", model, "--anchor", anchor, "-o", out)
    assert f"{out}: is there already" in said
    assert out.read_text() == "mine"
    answer("align", model, "--anchor", anchor, "-o", out, "--force")
    assert load_file(out).keys() == load_file(model).keys()


def test_a_folder_is_replaced_by_force_only_if_it_holds_a_model(tmp_path: Path) -> None:
    anchor, model, out = saved("llama", tmp_path / "a"), tmp_path / "b", tmp_path / "out"
    planted("llama", model)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    command = ("align", model, "--anchor", anchor, "-o", out, "--force")
    assert "is a folder without a model" in refusal(*command)
    shutil.copyfile(model / "model.safetensors", out / "model.safetensors")
    assert fedbasin(*command).exit_code == 0
    assert not (out / "thesis.txt").exists()
    assert distance(anchor, out) < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


@pytest.mark.parametrize("place", ["b", "b/inside", "a", "."])
def test_what_is_read_is_not_written(tmp_path: Path, place: str) -> None:
    anchor, model = saved("llama", tmp_path / "a"), saved("llama", tmp_path / "b")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = ("align", model, "--anchor", anchor, "-o", tmp_path / place, "--force")
    said = refusal(*command)
    assert "itself; give another name" in said or "overlaps" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.safetensors", "a.safetensors itself"),
        ("b.safetensors", "b.safetensors itself"),
        ("out.safetensors", "out.safetensors itself"),
        ("there.txt", "is there already"),
        ("no/transform.safetensors", "its folder does not exist"),
    ],
)
def test_a_transform_overwrites_nothing(tmp_path: Path, pair: tuple[Path, Path], name: str, message: str) -> None:
    anchor, model = pair
    (tmp_path / "there.txt").write_text("mine")
    out = tmp_path / "out.safetensors"
    command = ("align", model, "--anchor", anchor, "-o", out, "--transform", tmp_path / name)
    assert message in refusal(*command)
    assert not out.exists()
    assert (tmp_path / "there.txt").read_text() == "mine"


def test_an_anchor_may_be_stored_otherwise_than_the_model(tmp_path: Path) -> None:
    anchor, model, out = saved("llama", tmp_path / "a"), tmp_path / "b", tmp_path / "out"
    planted("llama", model, "4KB")
    (report,) = answer("align", model, "--anchor", anchor / "model.safetensors", "-o", out)
    assert report["distance_after"] < 1e-4


def test_a_file_does_not_become_a_folder(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    anchor, model = pair
    (tmp_path / "out").mkdir()
    said = refusal("align", model, "--anchor", anchor, "-o", tmp_path / "out", "--force")
    assert "is a folder and would become a file" in said


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    anchor, model = pair
    said = refusal("align", model, "--anchor", anchor, "-o", tmp_path / "no" / "out.safetensors")
    assert "its folder does not exist" in said


def test_a_missing_option_is_bad_usage(pair: tuple[Path, Path]) -> None:
    done = fedbasin("align", pair[1], "-o", "out")
    assert done.exit_code == 2
    assert "--anchor" in done.stderr


def test_a_model_is_not_a_transform(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    said = refusal("apply", pair[0], pair[1], "-o", tmp_path / "out.safetensors")
    assert "is not a transform" in said


@pytest.fixture
def transform(tmp_path: Path, pair: tuple[Path, Path]) -> Path:
    anchor, model = pair
    path = tmp_path / "transform.safetensors"
    out = ("-o", tmp_path / "aligned.safetensors")
    answer("align", model, "--anchor", anchor, *out, "--transform", path)
    return path


def test_a_transform_of_another_model_is_refused(tmp_path: Path, transform: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "c.safetensors")
    said = refusal("apply", transform, tmp_path / "c.safetensors", "-o", tmp_path / "o.safetensors")
    assert "space 'hidden', axis 0.weight[0]: the model has no such tensor" in said


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"hidden.order": torch.zeros(6, dtype=torch.int64)}, "hidden.order is not an order of 6"),
        ({"hidden.order": torch.arange(5)}, "hidden.order is not an order of 6"),
        ({"other": torch.arange(6)}, "hidden.order is not an order of 6"),
        (
            {"hidden.order": torch.arange(6), "hidden.role.0": torch.zeros(6, 2, 2)},
            "hidden.role.0 has shape (6, 2, 2), but S(6) needs (6, 1, 1)",
        ),
    ],
)
def test_a_transform_that_fits_no_group_is_refused(
    tmp_path: Path, transform: Path, pair: tuple[Path, Path], tensors: dict[str, torch.Tensor], message: str
) -> None:
    with safe_open(transform, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, transform, metadata)
    assert message in refusal("apply", transform, pair[1], "-o", tmp_path / "out.safetensors")


def test_an_answer_in_json_is_one_line(pair: tuple[Path, Path]) -> None:
    anchor, model = pair
    done = fedbasin("align", model, "--anchor", anchor, "-o", model.with_name("out.safetensors"), "--json")
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["spaces"][0].keys() >= {"space", "certified", "moved", "gain"}


def test_a_residual_stream_rotates_where_its_norms_are_folded(tmp_path: Path) -> None:
    anchor, model, out = saved("llama", tmp_path / "a"), tmp_path / "b", tmp_path / "out"
    planted("llama", model)
    transform = tmp_path / "transform"
    given = ("--rotate-residual",)
    (report,) = answer("align", model, "--anchor", anchor, "-o", out, "--transform", transform, *given)
    assert report["distance_after"] < report["distance_before"]
    assert (outputs("llama", out) - outputs("llama", model)).abs().max() < 1e-4
    again = tmp_path / "again"
    assert fedbasin("apply", transform, model, "-o", again).exit_code == 0
    assert distance(out, again) == 0
    assert fedbasin("check", out, *given).exit_code == 0
    notation = tmp_path / "notation.txt"
    notation.write_text(fedbasin("inspect", model, *given, "--notation").stdout)
    by_notation = tmp_path / "by-notation"
    answer("align", model, "--anchor", anchor, "-o", by_notation, "--symmetry", notation)
    assert distance(out, by_notation) == 0
