"""A request travels whole, in a message that Flower uploads once for all its nodes."""

from dataclasses import fields, replace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, plain
from fedbasin.proto.header import MOVING, WireError, read_header, without_header, write_header
from fedbasin.proto.packing import PackingError
from fedbasin.proto.request import FROZEN_KEY, ROUND_KEY, Refit, Request, Start
from tests import tiny
from tests.proto.messages import ANCHOR, NUMBERED, REQUEST, different_fields, is_equal, requests

# Fields of one side alone: the client's seed, and what the message says in another place.
LOCAL = ["kind", "config", "config_key", "seed", "packed"]


def test_the_filled_request_sets_every_field():
    default = Request("")
    for field in fields(Request):
        if field.name not in ("kind", "seed", "packed"):
            assert not is_equal(getattr(REQUEST, field.name), getattr(default, field.name)), field


@pytest.mark.parametrize("packed", [True, False])
def test_every_field_arrives(packed):
    read = Request.from_message(REQUEST.to_content(packed=packed))
    assert different_fields(REQUEST, read) == [n for n in LOCAL if n not in ("kind", "seed") and (n != "packed" or packed)]  # fmt: skip
    assert read.packed == packed


@pytest.mark.parametrize("packed", [True, False])
@given(data=st.data())
def test_a_request_that_is_written_is_read(packed, data):
    request = data.draw(requests(packed=packed))
    read = Request.from_message(request.to_content(packed=packed))
    assert not set(different_fields(request, read)) - set(LOCAL)
    assert list(read.anchor) == list(request.anchor)
    # An anchor without a tensor has no manifest that says how it came.
    assert read.packed == packed


def test_the_apps_settings_are_copied_with_the_round_in_them():
    config = {"lr": 0.5}
    content = Request("fuse", round=4, config=config).to_content()
    assert dict(without_header(content["config"])) == {"lr": 0.5, "server-round": 4}
    assert config == {"lr": 0.5}
    assert ROUND_KEY == "server-round"


def test_a_frozen_factor_is_told_to_the_app():
    content = REQUEST.to_content()
    assert dict(without_header(content["settings"])) == {"lr": 0.5, "name": "app", ROUND_KEY: 3, FROZEN_KEY: "lora_A"}
    assert FROZEN_KEY == "frozen-factor"
    assert FROZEN_KEY not in Request("fuse").to_content()["config"]


def test_every_node_gets_the_same_content_which_flower_uploads_once():
    tiny.federation(1).grid()  # sets what Flower needs to make a message
    request = Request("fuse", round=4, anchor=ANCHOR)
    content = request.to_content()
    messages = request.to_messages(content, [7, 9])
    assert [m.metadata.dst_node_id for m in messages] == [7, 9]
    assert all(m.content is content for m in messages)
    assert {m.metadata.message_type for m in messages} == {"train"}
    assert {m.metadata.group_id for m in messages} == {"4"}


@pytest.mark.parametrize(
    ("kind", "refit", "sent"),
    [
        ("train", None, "train"),
        ("evaluate", None, "evaluate"),
        ("train", Refit(), "train"),
        ("evaluate", Refit(), "train"),
    ],
)
def test_the_app_evaluates_only_what_the_mod_does_not_answer_itself(kind, refit, sent):
    tiny.federation(1).grid()
    request = Request("a stage", kind, refit=refit)
    (message,) = request.to_messages(request.to_content(), [7])
    assert message.metadata.message_type == sent


def test_a_packed_request_has_one_array_for_each_dtype_and_fewer_bytes():
    request = Request("fuse", anchor=tiny.net().state_dict())
    packed, ordinary = request.to_content(packed=True), request.to_content()
    assert sorted(packed["arrays"]) == ["float32", "int64"]
    assert len(ordinary["arrays"]) == len(request.anchor)
    assert packing.nbytes(ordinary["arrays"]) > packing.nbytes(packed["arrays"])


def test_arrays_that_exist_already_are_sent_as_they_are():
    arrays = plain.write_arrays(ANCHOR)
    content = Request("fuse", anchor=ANCHOR).to_content(arrays=arrays)
    assert content["arrays"] is arrays
    assert is_equal(Request.from_message(content).anchor, ANCHOR)


def test_plain_arrays_have_the_apps_names_and_packed_ones_the_models():
    request = Request("fuse", anchor=ANCHOR, array_names=NUMBERED)
    content = request.to_content()
    assert list(content["arrays"]) == ["0", "1", "2", "3"]
    assert is_equal(Request.from_message(content).anchor, ANCHOR)
    header = read_header(request.to_content(packed=True), pb.Request())
    assert [spec.name for spec in header.anchor] == list(ANCHOR)


def test_names_are_translated_there_and_back_and_unknown_ones_stay():
    request = Request("fuse", array_names={"w": "0", "b": "1"})
    state = {"w": torch.ones(1), "b": torch.zeros(1), "extra": torch.ones(2)}
    assert list(request.for_app(state)) == ["0", "1", "extra"]
    assert list(request.from_app(request.for_app(state))) == ["w", "b", "extra"]


def test_a_merged_model_travels_in_a_record_of_its_own():
    assert MOVING in REQUEST.to_content()
    assert MOVING not in Request("link").to_content()
    content = REQUEST.to_content()
    del content[MOVING]
    with pytest.raises(WireError, match="no record 'moving' of arrays"):
        Request.from_message(content)


def test_a_client_aligns_where_it_is_told_a_symmetry():
    assert REQUEST.aligns
    assert not Request("fuse").aligns


def test_a_request_without_its_arrays_is_refused():
    content = REQUEST.to_content()
    del content["model"]
    with pytest.raises(WireError, match="no record 'model' of arrays"):
        Request.from_message(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: setattr(h, "start", "elsewhere"), "'elsewhere' is not a Start; .* shared, own"),
        (lambda h: setattr(h, "start", ""), "'' is not a Start"),
        (lambda h: setattr(h.encodings[0].value.gram, "kind", "x"), "'x' is not a GramKind"),
        (lambda h: setattr(h.encodings[0].value, "moment", "x"), "'x' is not a MomentKind"),
        (lambda h: setattr(h.identity_bounds[0], "value", b"1234567"), "bound of 7 bytes"),
    ],
)
def test_values_that_this_version_does_not_know_are_refused(change, message):
    content = REQUEST.to_content()
    header = read_header(content, pb.Request())
    change(header)
    write_header(content, header, REQUEST.config_key)
    with pytest.raises(WireError, match=message):
        Request.from_message(content)


def test_a_manifest_beyond_the_arrays_is_refused():
    content = REQUEST.to_content(packed=True)
    header = read_header(content, pb.Request())
    header.anchor[0].shape.append(99)
    write_header(content, header, REQUEST.config_key)
    with pytest.raises(PackingError, match=r"'0\.weight'"):
        Request.from_message(content)


def test_a_tensor_that_does_not_travel_is_refused_when_the_request_is_made():
    request = replace(Request("fuse"), anchor={"w": torch.zeros(2).bfloat16()})
    with pytest.raises(PackingError, match="set packed"):
        request.to_content()
    read = Request.from_message(request.to_content(packed=True))
    assert read.anchor["w"].dtype == torch.bfloat16


def test_the_records_of_a_request_are_those_that_the_format_names():
    content = REQUEST.to_content()
    kinds = {name: type(record) for name, record in content.items()}
    assert kinds == {"settings": ConfigRecord, "model": ArrayRecord, MOVING: ArrayRecord}
    assert Request.from_message(content).start is Start.own
