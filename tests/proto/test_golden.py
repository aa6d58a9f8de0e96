"""Messages have the bytes that were committed: another version of fedbasin can read them.

A change of these bytes is a change of the format. It needs another SCHEMA_VERSION, and then new files:

    PYTHONPATH=.links:. python tests/proto/test_golden.py
"""

import json
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedbasin.proto.header import HEADER
from fedbasin.proto.reply import Reply
from fedbasin.proto.request import Request
from tests.proto.messages import REPLY, REQUEST, different_fields

FOLDER = Path(__file__).parent / "golden"
MESSAGES = {
    f"{name}_{form}": make
    for form in ("plain", "packed")
    for name, make in {
        "request": lambda packed: REQUEST.to_content(packed=packed),
        "reply": lambda packed: REPLY.to_content(REQUEST, packed=packed),
    }.items()
}


def content_of(name):
    return MESSAGES[name](name.endswith("packed"))


def to_json(content):
    """The records of a message; bytes are hexadecimal."""
    records = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            records[name] = {
                key: {"dtype": array.dtype, "shape": list(array.shape), "stype": array.stype, "data": array.data.hex()}
                for key, array in record.items()
            }
        else:
            records[name] = dict(record)
    return records


def from_json(records):
    content = RecordDict()
    for name, record in records.items():
        if name == "metrics":
            content[name] = MetricRecord(record)
        elif name in (HEADER, REQUEST.config_key):
            content[name] = ConfigRecord(record)
        else:
            content[name] = ArrayRecord({key: array_of(array) for key, array in record.items()})
    return content


def array_of(values):
    shape = tuple(values["shape"])
    return Array(values["dtype"], shape, values["stype"], bytes.fromhex(values["data"]))


def golden(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_has_the_committed_bytes(name):
    written, expected = to_json(content_of(name)), golden(name)
    assert list(written) == list(expected)
    for record, values in expected.items():
        assert written[record] == values, f"the record {record!r} has changed: see {__name__}"


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_the_committed_request_is_read(form):
    read = Request.from_message(from_json(golden(f"request_{form}")))
    local = ["config", "config_key"]
    assert different_fields(REQUEST, read) == local + ["packed"] * (form == "packed")


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_the_committed_reply_is_read(form):
    read = Reply.from_message(from_json(golden(f"reply_{form}")), REQUEST)
    assert different_fields(REPLY, read) == ["payload_bytes"]


if __name__ == "__main__":
    for name in MESSAGES:
        text = json.dumps(to_json(content_of(name)), indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n")
