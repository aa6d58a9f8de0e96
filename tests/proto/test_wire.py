"""Headers travel whole, and whatever else is in their place is refused by name."""

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import wire

READERS = [(wire.read_request, pb.Request), (wire.read_update, pb.UpdateHeader)]
both = pytest.mark.parametrize(("read", "kind"), READERS)


def content(data):
    return RecordDict({wire.HEADER: ConfigRecord({"header": data})})


@both
def test_a_header_that_is_written_is_read(read, kind):
    record, header = RecordDict(), kind(round=3, stage="fuse")
    assert not wire.has_header(record)
    wire.write(record, header)
    assert wire.has_header(record)
    assert read(record) == kind(round=3, stage="fuse", schema_version=wire.SCHEMA_VERSION)


@both
def test_another_version_is_refused_with_both_numbers(read, kind):
    data = kind(schema_version=wire.SCHEMA_VERSION + 1).SerializeToString()
    with pytest.raises(
        wire.SchemaVersionError, match=f"version {wire.SCHEMA_VERSION + 1}.*this is"
    ):
        read(content(data))


@both
@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({wire.HEADER: MetricRecord({"header": 1})}),
        RecordDict({wire.HEADER: ArrayRecord()}),
        RecordDict({wire.HEADER: ConfigRecord()}),
        content("text"),
        content([b"list"]),
    ],
    ids=["nothing", "metrics", "arrays", "empty", "text", "list"],
)
def test_a_record_without_a_header_is_refused(read, kind, record):
    with pytest.raises(wire.WireError, match="no record 'fedbasin' with bytes"):
        read(record)


@both
@given(data=st.binary(max_size=50))
def test_any_other_bytes_are_read_or_refused_by_name(read, kind, data):
    try:
        header = read(content(data))
    except wire.WireError:
        return
    assert header.schema_version == wire.SCHEMA_VERSION


def test_lists_among_metrics_are_left_out():
    record = MetricRecord({"loss": 0.5, "steps": 3, "history": [1.0, 2.0]})
    assert wire.numbers(record) == {"loss": 0.5, "steps": 3.0}
