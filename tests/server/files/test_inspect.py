import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from tests.server.files.stored import MLP, answer, fedbasin, perceptron, refusal, saved

STREAM = "model.embed_tokens"
HEADS = [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
GATES = [f"model.layers.{block}.mlp.gate_proj" for block in (0, 1)]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved("llama", tmp_path / "llama")


def test_a_folder_is_listed_by_space(llama: Path) -> None:
    (found,) = answer("inspect", llama)
    spaces = {space["space"]: space for space in found["spaces"]}
    assert list(spaces) == [STREAM, *HEADS[:1], *GATES[:1], *HEADS[1:], *GATES[1:]]
    assert spaces[STREAM]["width"] == 16
    assert spaces[STREAM]["share"] == 1
    assert found["coverage"] == 1
    assert found["kinds"].keys() == {"O*S wr S", "(R*O)xS wr S", "S*O wr S"}
    assert found["architecture"] == "LlamaForCausalLM"
    assert spaces[GATES[0]]["group"] == "S(1)*O(1) wr S(10)"
    assert spaces[GATES[0]]["share"] == pytest.approx(3 * 160 / found["parameters"])
    assert set(spaces[HEADS[1]]["tensors"]) == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "kqvo"}
    assert found["dtypes"] == {"float32": found["tensors"]}
    assert found["bytes"] == 4 * found["parameters"]


def test_the_table_says_the_same(llama: Path) -> None:
    lines = fedbasin("inspect", llama).stdout.splitlines()
    assert lines[0].split() == ["space", "group", "width", "tensors", "share"]
    # A long name is folded.
    (first, *_) = (line.split() for line in lines if "S(1)*O(1)" in line)
    assert GATES[0].startswith(first[0])
    assert first[1:] == ["S(1)*O(1)", "wr", "S(10)", "10", "3", "13.5%"]
    assert "touched by no space: nothing" in lines


def test_shards_are_counted(tmp_path: Path) -> None:
    (found,) = answer("inspect", saved("llama", tmp_path / "llama", shard="4KB"))
    assert found["files"] == 4
    assert found["parameters"] == 3568


def test_what_no_space_touches_is_named(tmp_path: Path) -> None:
    (found,) = answer("inspect", saved("bert", tmp_path / "bert"))
    assert found["untouched"] == ["cls.predictions.bias"]


def test_a_head_that_is_the_table_of_the_input_is_said_to_be(tmp_path: Path) -> None:
    model = saved("qwen2_tied", tmp_path / "qwen2")
    (found,) = answer("inspect", model)
    assert found["ties_embeddings"]
    assert "lm_head.weight" not in found["spaces"][0]["tensors"]
    assert "the head is the table of the input" in fedbasin("inspect", model).stdout


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--spaces", "*.mlp.*"], GATES),
        (["--spaces", STREAM, "--spaces", "*.1.self_attn.*"], [STREAM, HEADS[1]]),
        (["--first", "1"], [HEADS[0], GATES[0]]),
        (["--last", "1"], [HEADS[1], GATES[1]]),
        (["--last", "1", "--layers", "*self_attn*"], [HEADS[1]]),
    ],
)
def test_spaces_are_chosen_by_name_and_by_block(llama: Path, options: list[str], names: list[str]) -> None:
    (found,) = answer("inspect", llama, *options)
    assert [space["space"] for space in found["spaces"]] == names
    assert found["untouched"] == []


def test_the_notation_can_be_saved_and_given_back(llama: Path, tmp_path: Path) -> None:
    notation = tmp_path / "llama.txt"
    notation.write_text(fedbasin("inspect", llama, "--notation").stdout)
    file = llama / "model.safetensors"
    (by_notation,) = answer("inspect", file, "--symmetry", notation)
    (by_config,) = answer("inspect", file, "--config", llama / "config.json")
    (by_folder,) = answer("inspect", llama)
    assert by_notation["architecture"] is None
    assert by_config["architecture"] == "LlamaForCausalLM"
    assert by_notation["spaces"] == by_config["spaces"] == by_folder["spaces"]


def test_a_file_may_hold_its_symmetry(tmp_path: Path) -> None:
    model = perceptron(tmp_path / "mlp.safetensors", metadata={"symmetry": MLP})
    (found,) = answer("inspect", model)
    assert found["spaces"] == [
        {
            "space": "hidden",
            "group": "S(6)",
            "width": 6,
            "tensors": ["0.weight", "0.bias", "2.weight"],
            "share": 48 / 51,
        }
    ]
    assert found["untouched"] == ["2.bias"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(6, 5, bias=False)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.table.weight


def test_a_tied_tensor_is_stored_once_and_its_other_name_needs_no_tensor(tmp_path: Path) -> None:
    save_model(Tied(), str(tmp_path / "tied.safetensors"))
    notation = tmp_path / "tied.txt"
    notation.write_text("stream  S(6)  table.weight[1] head.weight[1]\n")
    (found,) = answer("inspect", tmp_path / "tied.safetensors", "--symmetry", notation)
    ((left_out, kept),) = found["tied"].items()
    assert {left_out, kept} == {"table.weight", "head.weight"}
    assert found["spaces"][0]["tensors"] == [kept]
    assert found["parameters"] == 30


def test_a_tied_tensor_cannot_move_in_two_ways(tmp_path: Path) -> None:
    save_model(Tied(), str(tmp_path / "tied.safetensors"))
    notation = tmp_path / "tied.txt"
    notation.write_text("stream  S(6)  table.weight[1]\nlabels  S(5)  head.weight[0]\n")
    said = refusal("inspect", tmp_path / "tied.safetensors", "--symmetry", notation)
    assert "are one tensor, which the symmetry would move in two ways" in said


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/no: there is no such file or folder" in refusal("inspect", f"{tmp_path}/no")


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_file_that_is_not_a_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    said = refusal("inspect", path)
    assert said.startswith(f"{path}: ")
    assert "not a whole safetensors file" in said or "no tensors" in said


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = perceptron(tmp_path / "mlp.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: not a whole safetensors file" in refusal("inspect", path)


def test_a_folder_without_a_model_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    said = refusal("inspect", tmp_path)
    assert "neither model.safetensors nor model.safetensors.index.json" in said
    assert "there is 'pytorch_model.bin'; only safetensors files are read" in said
    assert "save_pretrained" in said


def test_a_pickle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, path)
    said = refusal("inspect", path)
    assert said.startswith(f"{path}: holds pickled weights, which can run code when they are read; only safetensors")
    assert "save_pretrained" in said


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return saved("llama", tmp_path / "llama", shard="4KB")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").unlink()
    said = refusal("inspect", sharded)
    assert f"{sharded}/model-00002-of-00004.safetensors: " in said
    assert "names this shard and it is missing" in said


def change_index(folder: Path, **changes: object) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: shard for name, shard in (index["weight_map"] | changes).items() if shard is not None}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": "model-00001-of-00004.safetensors"}, r"model-00001-of-00004.safetensors: 'extra' missing, which"),
        ({"lm_head.weight": None}, "index.json: 'lm_head.weight' missing in it"),
        ({"extra": "../other.safetensors"}, "the shard of 'extra' is '../other.safetensors'"),
        ({"extra": 3}, "the shard of 'extra' is 3"),
        *(({"extra": shard}, f"the shard of 'extra' is '{shard}'") for shard in ("", ".", "..")),
    ],
)
def test_an_index_of_another_model_is_refused(sharded: Path, changes: dict[str, object], message: str) -> None:
    change_index(sharded, **changes)
    assert message in refusal("inspect", sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 1}'])
def test_a_file_that_is_not_an_index_is_refused(sharded: Path, content: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(content)
    assert refusal("inspect", sharded).startswith(f"{index}: ")


def test_an_architecture_that_the_library_does_not_have_is_refused(llama: Path) -> None:
    config = llama / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForChess"))
    said = refusal("inspect", llama)
    assert "architectures says 'LlamaForChess', which transformers" in said
    assert "give --module" in said


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "LlamaConfig", "PreTrainedModel", 7, {"a": 1}])
def test_what_is_no_architecture_is_not_run(llama: Path, name: object) -> None:
    config = llama / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": [name]}))
    assert refusal("inspect", llama).startswith(f"{llama}")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": 3}'])
def test_a_file_that_is_not_a_config_is_refused(llama: Path, content: str) -> None:
    (llama / "config.json").write_text(content)
    said = refusal("inspect", llama, "--config", llama / "config.json")
    assert said.startswith(f"{llama / 'config.json'}: ")


def test_a_config_of_another_size_is_refused(llama: Path) -> None:
    config = llama / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 8'))
    said = refusal("inspect", llama)
    assert "LlamaForCausalLM has other shapes by its config: 'model.embed_tokens.weight (31, 16) for (31, 8)'" in said


@pytest.mark.parametrize("key", ["num_key_value_heads", "num_attention_heads"])
@pytest.mark.parametrize("value", [0, -1, "two"])
def test_a_config_with_a_number_that_makes_no_model_is_refused(llama: Path, key: str, value: object) -> None:
    config = llama / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    assert refusal("inspect", llama).startswith(f"{llama}")


def test_a_file_without_a_symmetry_asks_for_one(tmp_path: Path) -> None:
    said = refusal("inspect", perceptron(tmp_path / "mlp.safetensors"))
    assert "give --symmetry FILE in the notation, --config config.json of its architecture, or --module" in said


def test_two_symmetries_are_one_too_many(llama: Path) -> None:
    config = llama / "config.json"
    said = refusal("inspect", llama, "--symmetry", config, "--config", config)
    assert "give one" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden  S(6)  1.weight[0]\n", "the model has no such tensor"),
        ("hidden  S(5)  0.weight[0]\n", "are not a multiple of the space's 5 units"),
        ("hidden  Q(6)  0.weight[0]\n", "'Q(6)' is not a group"),
        ("hidden\n", "not a space: 'hidden'"),
        ("", "no space"),
    ],
)
def test_a_symmetry_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    model = perceptron(tmp_path / "mlp.safetensors")
    (tmp_path / "notation.txt").write_text(text)
    assert message in refusal("inspect", model, "--symmetry", tmp_path / "notation.txt")


def test_a_notation_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = perceptron(tmp_path / "mlp.safetensors")
    said = refusal("inspect", model, "--symmetry", tmp_path / "no.txt")
    assert f"{tmp_path}/no.txt: cannot be read as a notation" in said


def test_spaces_that_are_not_there_are_refused_with_those_that_are(llama: Path) -> None:
    said = refusal("inspect", llama, "--spaces", "ffn.*")
    assert f"'ffn.*'; there are '{STREAM}', '{HEADS[0]}', '{GATES[0]}' and 2 more" in said


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float8_e4m3fn, "'w' of space 'hidden' is torch.float8_e4m3fn"),
        (torch.int8, "the tensor is torch.int8; only floating tensors"),
    ],
)
def test_a_dtype_in_which_nothing_turns_is_refused(tmp_path: Path, dtype: torch.dtype, message: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(6, 2).to(dtype)}, path, {"symmetry": "hidden  S(6)  w[0]"})
    assert message in refusal("inspect", path)


def renamed(path: Path, old: str, new: str) -> None:
    state = load_file(path)
    state |= {name.replace(old, new): tensor.clone() for name, tensor in state.items()}
    kept = {name: t for name, t in state.items() if old not in name}
    save_file(kept, path, {"format": "pt"})


def test_norms_of_old_files_are_known_by_their_old_names(tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "bert")
    (before,) = answer("inspect", model)
    renamed(model / "model.safetensors", "LayerNorm.weight", "LayerNorm.gamma")
    renamed(model / "model.safetensors", "LayerNorm.bias", "LayerNorm.beta")
    (after,) = answer("inspect", model)
    assert "bert.embeddings.LayerNorm.gamma" in after["spaces"][0]["tensors"]
    assert [space["share"] for space in after["spaces"]] == [space["share"] for space in before["spaces"]]


def test_the_names_of_published_vision_models_are_known(tmp_path: Path) -> None:
    (found,) = answer("inspect", saved("vit", tmp_path / "vit"))
    spaces = {space["space"]: space["tensors"] for space in found["spaces"]}
    assert "vit.encoder.layer.0.intermediate.dense.weight" in spaces["vit.layers.0.mlp.fc1"]
    assert "vit.encoder.layer.1.attention.attention.query.weight" in spaces["vit.layers.1.attention.q_proj"]


def test_experts_that_are_stored_one_by_one_move_as_the_module_stacks_them(tmp_path: Path) -> None:
    (found,) = answer("inspect", saved("mixtral", tmp_path / "mixtral"))
    assert found["coverage"] > 0.95
    tensors = {name for space in found["spaces"] for name in space["tensors"]}
    assert "model.layers.0.mlp.experts.down_proj" in tensors


def test_a_residual_stream_that_rotates_has_the_orthogonal_group(llama: Path) -> None:
    (plain,) = answer("inspect", llama)
    (rotating,) = answer("inspect", llama, "--rotate-residual")
    assert len(rotating["spaces"]) == len(plain["spaces"])
    assert rotating["spaces"][0]["group"] == f"O({plain['spaces'][0]['width']})"
    assert "model.norm ->" in fedbasin("inspect", llama, "--rotate-residual", "--notation").stdout


def test_a_residual_stream_that_cannot_rotate_is_refused(llama: Path, tmp_path: Path) -> None:
    said = refusal("inspect", saved("bert", tmp_path / "bert"), "--rotate-residual")
    assert "'bert.embeddings.LayerNorm.weight' scales single entries of the stream" in said
    said = refusal("inspect", saved("qwen2_tied", tmp_path / "qwen2"), "--rotate-residual")
    assert "tie_word_embeddings = False" in said
    notation = tmp_path / "notation.txt"
    notation.write_text(fedbasin("inspect", llama, "--notation").stdout)
    said = refusal("inspect", llama, "--rotate-residual", "--symmetry", notation)
    assert "--rotate-residual executes the model" in said
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    said = refusal("inspect", llama, "--rotate-residual")
    assert "tie_word_embeddings = False" in said
