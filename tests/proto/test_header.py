"""Headers travel whole, and whatever else is in their place is refused by name."""

import json

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing
from fedbasin.proto.header import (
    HEADER,
    SCHEMA_VERSION,
    SchemaVersionError,
    WireError,
    array_record,
    has_header,
    read_header,
    records,
    without_header,
    write_header,
)
from tests.proto.messages import header_record

both = pytest.mark.parametrize("kind", [pb.Request, pb.Reply])


def content(value):
    return RecordDict({HEADER: ConfigRecord({HEADER: value})})


@both
def test_a_header_that_is_written_is_read(kind):
    record, header = RecordDict(), kind(round=3, stage="fuse")
    assert not has_header(record)
    write_header(record, header)
    assert has_header(record)
    assert read_header(record, kind()) == kind(round=3, stage="fuse", schema_version=SCHEMA_VERSION)


def test_a_header_in_the_apps_config_leaves_its_keys_and_goes_without_a_trace():
    config = ConfigRecord({"lr": 0.5})
    record = RecordDict({"config": config})
    write_header(record, pb.Request(round=3), "config")
    assert list(record) == ["config"]
    assert json.loads(json.dumps(dict(record["config"])))["lr"] == 0.5
    assert read_header(record, pb.Request()).round == 3
    assert without_header(record["config"]) == config


@pytest.mark.parametrize("text", ["no base64!", "AAA", "////"])
def test_text_that_is_no_header_is_refused(text):
    with pytest.raises(WireError, match="does not parse"):
        read_header(content(text), pb.Reply())


@both
def test_another_version_is_refused_with_both_numbers(kind):
    data = kind(schema_version=SCHEMA_VERSION + 1).SerializeToString()
    message = f"version {SCHEMA_VERSION + 1}.*this is version {SCHEMA_VERSION}"
    with pytest.raises(SchemaVersionError, match=message):
        read_header(RecordDict({HEADER: header_record(data)}), kind())


@both
@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({HEADER: MetricRecord({HEADER: 1})}),
        RecordDict({HEADER: ArrayRecord()}),
        RecordDict({HEADER: ConfigRecord()}),
        content(b"bytes"),
        content(["list"]),
    ],
    ids=["nothing", "metrics", "arrays", "empty", "bytes", "list"],
)
def test_a_record_without_a_header_is_refused(kind, record):
    with pytest.raises(WireError, match="no ConfigRecord with text under 'fedbasin'"):
        read_header(record, kind())


@both
@given(data=st.binary(max_size=50))
def test_any_other_bytes_are_read_or_refused_by_name(kind, data):
    try:
        header = read_header(RecordDict({HEADER: header_record(data)}), kind())
    except WireError:
        return
    assert header.schema_version == SCHEMA_VERSION


def test_records_of_a_kind_are_found_by_name_and_a_missing_one_is_named():
    arrays, _ = packing.pack({})
    record = RecordDict({"arrays": arrays, "metrics": MetricRecord(), "config": ConfigRecord()})
    assert list(records(record, ArrayRecord)) == ["arrays"]
    assert list(records(record, MetricRecord)) == ["metrics"]
    assert array_record(record, "arrays") is arrays
    for name in ("metrics", "statistics"):
        with pytest.raises(WireError, match=f"no record '{name}' of arrays"):
            array_record(record, name)
