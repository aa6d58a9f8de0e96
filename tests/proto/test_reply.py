"""A reply travels whole; that of an app without the mod is read as far as it goes."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, plain
from fedbasin.proto.header import HEADER, STATISTICS, SchemaVersionError, WireError, read_header, write_header
from fedbasin.proto.packing import PackingError
from fedbasin.proto.reply import LayerStatistic, Reply, read_metrics
from fedbasin.proto.request import Request
from tests.proto.messages import (
    ANCHOR,
    NUMBERED,
    REPLY,
    REQUEST,
    different_fields,
    header_bytes,
    header_record,  # fmt: skip
    is_equal,
    replies,
    requests,
)

ASKED = Request("fuse", round=3, anchor_digest=b"digest")


def round_trip(reply, request, packed):
    return Reply.from_message(reply.to_content(request, packed=packed), request)


def test_the_filled_reply_sets_every_field():
    default = Reply(0, "")
    for field in fields(Reply):
        if field.name not in ("payload_bytes", "has_mod"):
            assert not is_equal(getattr(REPLY, field.name), getattr(default, field.name)), field


@pytest.mark.parametrize("packed", [True, False])
def test_every_field_arrives(packed):
    read = round_trip(REPLY, REQUEST, packed)
    assert different_fields(REPLY, read) == ["payload_bytes"]
    assert read.payload_bytes > 0


@pytest.mark.parametrize("packed", [True, False])
@given(data=st.data())
def test_a_reply_that_is_written_is_read(packed, data):
    request = data.draw(requests(packed=packed))
    reply = data.draw(replies(packed=packed))
    if request.array_names:
        request = replace(request, array_names={name: str(n) for n, name in enumerate(reply.parameters or {})})
    # The weight is a metric of its own name.
    metrics = {k: v for k, v in reply.metrics.items() if k != request.weight_key}
    reply = replace(reply, metrics=metrics)
    read = round_trip(reply, request, packed)
    assert not set(different_fields(reply, read)) - {"payload_bytes"}
    assert list(read.parameters or {}) == list(reply.parameters or {})


def test_the_weight_travels_among_the_metrics_under_the_name_that_was_asked_for():
    content = REPLY.to_content(REQUEST)
    assert dict(content["metrics"]) == {"loss": 0.5, "curve": [1.0, 2.0], "examples": 20.0}
    read = Reply.from_message(content, REQUEST)
    assert (read.examples, read.metrics) == (20.0, {"loss": 0.5, "curve": [1.0, 2.0]})


@pytest.mark.parametrize("weight", [{}, {"num-examples": [1.0, 2.0]}])
def test_a_weight_that_is_no_number_is_zero(weight):
    content = RecordDict({"metrics": MetricRecord({"loss": 1, **weight})})
    read = Reply.from_message(content, ASKED)
    assert (read.examples, read.metrics) == (0.0, {"loss": 1.0})


def test_a_packed_reply_has_one_array_for_each_dtype():
    assert sorted(REPLY.to_content(REQUEST, packed=True)["model"]) == ["float32", "float64", "int64"]
    assert list(REPLY.to_content(REQUEST)["model"]) == list(NUMBERED.values())


def test_the_payload_is_the_bytes_of_all_arrays():
    content = REPLY.to_content(REQUEST, packed=True)
    expected = packing.nbytes(content["model"]) + packing.nbytes(content[STATISTICS])
    assert Reply.from_message(content, REQUEST).payload_bytes == expected


def test_a_reply_without_statistics_has_no_record_of_them():
    assert STATISTICS not in replace(REPLY, statistics=()).to_content(REQUEST)


def test_a_reply_that_is_kept_without_its_statistics_is_read_without():
    content = REPLY.to_content(REQUEST)
    del content[STATISTICS]
    read = Reply.from_message(content, REQUEST)
    assert read.statistics == ()
    assert is_equal(read.parameters, REPLY.parameters)


def test_the_tensors_of_statistics_are_in_the_order_of_their_form():
    parts = tuple(torch.full((size,), float(size)) for size in (3, 1, 2))
    reply = replace(REPLY, statistics=(LayerStatistic(("w",), "gram", parts, parts[:2]),))
    (read,) = round_trip(reply, REQUEST, packed=True).statistics
    assert [len(piece) for piece in read.pieces] == [3, 1, 2]
    assert [len(piece) for piece in read.moment] == [3, 1]


def test_tensors_are_views_of_the_bytes_of_the_message():
    content = replace(REPLY, parameters={"w": torch.zeros(1000)}).to_content(ASKED, packed=True)
    data = np.frombuffer(content["arrays"]["float32"].data, np.uint8)
    tensor = Reply.from_message(content, ASKED).parameters["w"]
    assert tensor.data_ptr() - data.__array_interface__["data"][0] == len(data) - 4000


def test_the_bytes_of_the_diagnostics_are_those_that_a_reply_without_them_saves():
    without = replace(REPLY, path=None, variance=(), alignment=replace(REPLY.alignment, singular_vectors=None))
    header, short = (len(header_bytes(reply.to_content(REQUEST))) for reply in (REPLY, without))
    assert without.probe_bytes == 0
    # Less the tags and lengths of the fields.
    assert 0 <= header - short - REPLY.probe_bytes <= 8
    assert REPLY.probe_bytes > 0


class TestWithoutTheMod:
    def test_one_record_of_arrays_of_any_name_is_the_model(self):
        metrics = MetricRecord({"num-examples": 5, "loss": 1})
        content = RecordDict({"mine": plain.write_arrays(ANCHOR), "told": metrics})
        read = Reply.from_message(content, ASKED)
        assert is_equal(read.parameters, ANCHOR)
        assert not read.has_mod
        assert (read.round, read.stage, read.anchor_digest) == (3, "fuse", b"digest")
        assert (read.examples, read.metrics) == (5.0, {"loss": 1.0})
        assert read.payload_bytes == packing.nbytes(content["mine"])

    def test_its_arrays_have_the_apps_names(self):
        arrays = plain.write_arrays({NUMBERED[name]: tensor for name, tensor in ANCHOR.items()})
        request = replace(ASKED, array_names=NUMBERED)
        assert is_equal(Reply.from_message(RecordDict({"arrays": arrays}), request).parameters, ANCHOR)

    @pytest.mark.parametrize("count", [0, 2])
    def test_without_one_record_of_arrays_there_is_no_model(self, count):
        content = RecordDict({f"arrays {n}": plain.write_arrays(ANCHOR) for n in range(count)})
        assert Reply.from_message(content, ASKED).parameters is None

    def test_the_requests_config_may_be_among_its_records(self):
        request = replace(ASKED, anchor=ANCHOR)
        content = request.to_content()
        content["metrics"] = MetricRecord({"num-examples": 5})
        read = Reply.from_message(content, request)
        assert not read.has_mod
        assert is_equal(read.parameters, ANCHOR)

    def test_its_other_records_are_left_alone(self):
        content = RecordDict({"notes": ConfigRecord({"a": 1}), "arrays": plain.write_arrays(ANCHOR)})
        assert Reply.from_message(content, ASKED).parameters is not None


def spoiled(change, packed=True):
    content = REPLY.to_content(REQUEST, packed=packed)
    header = read_header(content, pb.Reply())
    change(header)
    write_header(content, header)
    return content


def test_a_manifest_beyond_the_arrays_is_refused():
    with pytest.raises(PackingError, match=r"'0\.weight'"):
        Reply.from_message(spoiled(lambda h: h.parameters[0].shape.append(99)), REQUEST)


def test_statistics_beyond_their_record_are_refused():
    with pytest.raises(PackingError, match="0 piece 0"):
        Reply.from_message(spoiled(lambda h: h.statistics[0].pieces[0].shape.append(9)), REQUEST)


def test_parts_that_overlap_are_refused():
    def twice(header):
        header.statistics[0].moment[0].CopyFrom(header.statistics[0].pieces[0])

    with pytest.raises(PackingError, match="twice"):
        Reply.from_message(spoiled(twice), REQUEST)


def test_parameters_without_their_record_are_refused():
    content = REPLY.to_content(REQUEST, packed=True)
    del content["model"]
    with pytest.raises(WireError, match="no record 'model' of arrays"):
        Reply.from_message(content, REQUEST)


def test_another_version_and_broken_headers_are_refused():
    content = REPLY.to_content(REQUEST)
    content[HEADER] = header_record(pb.Reply(schema_version=99).SerializeToString())
    with pytest.raises(SchemaVersionError, match="99"):
        Reply.from_message(content, REQUEST)
    content[HEADER] = header_record(b"\xff")
    with pytest.raises(WireError, match="does not parse"):
        Reply.from_message(content, REQUEST)


@given(data=st.binary(max_size=60))
def test_any_bytes_in_place_of_the_header_are_read_or_refused_by_name(data):
    content = RecordDict({HEADER: header_record(data), "arrays": ArrayRecord()})
    try:
        reply = Reply.from_message(content, ASKED)
    except (WireError, PackingError):
        return
    assert reply.has_mod


@given(position=st.integers(0), byte=st.integers(0, 255))
def test_a_flipped_byte_of_the_header_is_read_or_refused_by_name(position, byte):
    content = REPLY.to_content(REQUEST, packed=True)
    header = bytearray(header_bytes(content))
    header[position % len(header)] = byte
    content[HEADER] = header_record(bytes(header))
    try:
        Reply.from_message(content, REQUEST)
    except (WireError, PackingError):
        return


def test_metrics_are_numbers_and_lists_of_numbers():
    record = MetricRecord({"loss": 0.5, "steps": 3, "history": [1, 2]})
    assert read_metrics(record) == {"loss": 0.5, "steps": 3.0, "history": [1.0, 2.0]}


def test_lists_among_metrics_are_no_scalars():
    reply = replace(REPLY, metrics={"loss": 0.5, "steps": 3.0, "history": [1.0, 2.0]})
    assert reply.scalars == {"loss": 0.5, "steps": 3.0}
