"""A run's folder survives whatever cuts the run off."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fedbasin.proto.report import ClientReport, RoundReport, StageReport
from fedbasin.server.run.resumption.checkpoint import (
    MODEL,
    REPORTS,
    Checkpoint,
    CheckpointError,
    append_report,
    load,
    read_reports,
    save,
)


def tied_model():
    model = nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    return model


def report(number, **more):
    return RoundReport("r", number, evaluate_metrics={"accuracy": 0.5}, **more)


def test_what_is_saved_is_loaded(tmp_path):
    state = dict(tied_model().state_dict())
    state |= {
        "half": torch.randn(3).bfloat16(),
        "mask": torch.tensor([True, False]),
        "transposed": torch.randn(3, 4).mT,
        "view": torch.arange(9.0)[2:5],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
    }
    save(tmp_path / "new" / "folder", Checkpoint(3, state, '{"recipe": "fedavg"}'))
    found = load(tmp_path / "new" / "folder")
    assert (found.server_round, found.settings) == (3, '{"recipe": "fedavg"}')
    assert found.model.keys() == state.keys()
    for name, tensor in state.items():
        assert found.model[name].dtype == tensor.dtype
        assert torch.equal(found.model[name], tensor)


def test_a_checkpoint_replaces_the_one_before(tmp_path):
    for number in (1, 2):
        save(tmp_path, Checkpoint(number, {"w": torch.full((2,), float(number))}, "{}"))
    assert load(tmp_path).server_round == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global-1.safetensors", MODEL]


def test_a_crash_before_the_new_file_is_whole_leaves_the_old_one(tmp_path, monkeypatch):
    save(tmp_path, Checkpoint(1, {"w": torch.ones(2)}, "{}"))

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, Checkpoint(2, {"w": torch.zeros(2)}, "{}"))
    monkeypatch.undo()
    assert (tmp_path / f"{MODEL}.part").exists()
    assert load(tmp_path).server_round == 1
    save(tmp_path, Checkpoint(2, {"w": torch.zeros(2)}, "{}"))
    assert load(tmp_path).server_round == 2


def test_half_a_part_file_is_in_nobodys_way(tmp_path):
    save(tmp_path, Checkpoint(1, {"w": torch.ones(2)}, "{}"))
    (tmp_path / f"{MODEL}.part").write_bytes(b"half")
    assert load(tmp_path).server_round == 1
    save(tmp_path, Checkpoint(2, {"w": torch.ones(2)}, "{}"))
    assert load(tmp_path).server_round == 2


def damage_end(data):
    return data[:-1]


def damage_header(data):
    return data[:8] + b"\xff" * 8 + data[16:]


def damage_everything(data):
    return b"no model"


def empty(data):
    return b""


@pytest.mark.parametrize("damage", [damage_end, damage_header, damage_everything, empty])
def test_a_damaged_file_is_named(tmp_path, damage):
    save(tmp_path, Checkpoint(1, {"w": torch.ones(20)}, "{}"))
    path = tmp_path / MODEL
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=str(path)):
        load(tmp_path)


def test_a_model_without_a_round_is_no_checkpoint(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / MODEL)
    with pytest.raises(CheckpointError, match="no checkpoint of fedbasin"):
        load(tmp_path)


METADATA = {"round": "2", "settings": "{}", "sha256": "", "optimizer-sha256": ""}


@pytest.mark.parametrize(
    "change",
    [
        *({"round": text} for text in ("", "0", "-4", "x", "²", "9" * 5000)),
        *({"settings": text} for text in ("", "{{", "[]", "5", "[" * 100_000)),
        *({key: None} for key in METADATA),
    ],
    ids=str,
)
def test_metadata_that_no_run_writes_are_damage_like_any_other(tmp_path, change):
    save(tmp_path, Checkpoint(1, {"w": torch.ones(2)}, "{}"))
    save(tmp_path, Checkpoint(2, {"w": torch.ones(2)}, "{}"))
    with safe_open(tmp_path / MODEL, "pt") as file:
        metadata = file.metadata()
    changed = {key: value for key, value in {**metadata, **change}.items() if value is not None}
    save_file({"w": torch.ones(2)}, tmp_path / MODEL, changed)
    found = load(tmp_path)
    assert found.server_round == 1
    assert str(tmp_path / MODEL) in found.passed_over[0]
    assert len(found.passed_over[0]) < 1000


def test_where_no_checkpoint_is_whole_it_says_what_to_do(tmp_path):
    save(tmp_path, Checkpoint(1, {"w": torch.ones(2)}, "{}"))
    (tmp_path / MODEL).write_bytes(b"")
    with pytest.raises(CheckpointError, match="put back a copy of one, or set resume = 'new'"):
        load(tmp_path)


def test_a_folder_without_a_model_says_what_to_pass(tmp_path):
    with pytest.raises(CheckpointError, match="resume takes the folder of a run"):
        load(tmp_path)


def test_reports_come_back_in_the_order_of_rounds(tmp_path):
    clients = (ClientReport(2**63, "accepted", metrics={"loss": math.nan}),)
    one = report(1, stages=(StageReport("fuse", clients=clients),))
    append_report(tmp_path / "new", one)
    append_report(tmp_path / "new", report(2))
    found = read_reports(tmp_path / "new")
    assert [r.round for r in found] == [1, 2]
    # As messages: NaN is not equal to itself.
    assert [r.to_message().SerializeToString(deterministic=True) for r in found] == [
        r.to_message().SerializeToString(deterministic=True) for r in (one, report(2))
    ]
    assert read_reports(tmp_path) == []


def test_of_a_round_that_was_repeated_the_last_counts(tmp_path):
    append_report(tmp_path, report(1))
    append_report(tmp_path, report(2, seconds=1))
    append_report(tmp_path, report(2, seconds=2))
    assert [(r.round, r.seconds) for r in read_reports(tmp_path)] == [(1, 0), (2, 2)]


@pytest.mark.parametrize("keep", [1, 7, -1])
def test_a_line_that_was_cut_off_costs_nothing_but_itself(tmp_path, keep):
    append_report(tmp_path, report(1))
    append_report(tmp_path, report(2))
    whole = (tmp_path / REPORTS).read_bytes()
    first = whole.index(b"\n") + 1
    (tmp_path / REPORTS).write_bytes(whole[:first] + whole[first:-1][:keep])
    assert [r.round for r in read_reports(tmp_path)] == [1]
    append_report(tmp_path, report(2, seconds=5))
    append_report(tmp_path, report(3))
    assert [(r.round, r.seconds) for r in read_reports(tmp_path)] == [(1, 0), (2, 5), (3, 0)]
