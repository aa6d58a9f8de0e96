"""Dataclasses and their messages: nothing is lost on the way, and the bytes of a report stay as they are."""

import dataclasses
import types
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import report
from fedbasin.proto.convert import ConversionError, from_protobuf, to_protobuf
from fedbasin.proto.encoding import Encoding, GramForm, GramKind, MomentKind
from fedbasin.proto.observer_service import ModelChunk, RunSummary
from fedbasin.proto.report import (
    AlignmentReport,
    Choice,
    ClientReport,
    Incident,
    LayerVariance,
    PathSums,
    ProbedPath,
    ReportError,
    RoundReport,
    ServerProbe,
    SingularVectors,
    SpaceReport,
    StageReport,
    Step,
    UpdateCosines,
)

GOLDEN = Path(__file__).parent / "golden" / "round_report.bin"
CLASSES = [
    *(cls for cls in vars(report).values() if isinstance(cls, type) and cls.__module__ == report.__name__
      and dataclasses.is_dataclass(cls)),
    RunSummary,
    ModelChunk,
]  # fmt: skip
SCALARS = {
    float: st.floats(allow_nan=False),
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    bytes: st.binary(max_size=8),
    bool: st.booleans(),
    datetime: st.datetimes(timezones=st.just(UTC)),
}


def instances(cls):
    """Any values that the message of a dataclass can carry."""
    fields = getattr(pb, cls.__name__).DESCRIPTOR.fields_by_name
    hints = get_type_hints(cls)
    named = {
        field.name: values(hints[field.name], fields[field.name])
        for field in dataclasses.fields(cls)
        if field.name != "schema_version"
    }
    return st.builds(cls, **named)


def values(kind, field):
    if isinstance(kind, types.UnionType):
        return st.none() | values(get_args(kind)[0], field)
    if get_origin(kind) is tuple:
        return st.lists(values(get_args(kind)[0], field), max_size=2).map(tuple)
    if get_origin(kind) is Mapping:
        entry = field.message_type.fields_by_name
        key, value = get_args(kind)
        return st.dictionaries(values(key, entry["key"]), values(value, entry["value"]), max_size=2)
    if dataclasses.is_dataclass(kind):
        return instances(kind)
    if issubclass(kind, Enum):
        return st.sampled_from(kind)
    if kind is int:
        bits = 32 if field.type == FieldDescriptor.TYPE_UINT32 else 64
        return st.integers(0, 2**bits - 1)
    return SCALARS[kind]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_dataclass_and_its_message_have_the_same_fields(cls):
    message = getattr(pb, cls.__name__).DESCRIPTOR
    assert {field.name for field in dataclasses.fields(cls)} == set(message.fields_by_name)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not RoundReport], ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_a_dataclass_comes_back_from_its_message(cls, data):
    value = data.draw(instances(cls))
    message = to_protobuf(value, getattr(pb, cls.__name__)())
    assert from_protobuf(cls, message) == value


@given(instances(RoundReport))
def test_a_report_comes_back_from_its_message_its_bytes_and_its_line(value):
    assert RoundReport.from_message(value.to_message()) == value
    assert RoundReport.from_bytes(value.to_bytes()) == value
    line = value.to_json()
    assert "\n" not in line
    assert RoundReport.from_json(line) == value
    assert RoundReport.from_json(line.encode()) == value


def full_report():
    """A report with a value in every field, and one entry in every map."""
    space = SpaceReport("hidden", True, 0.25, 1.5, 0.75, 0.5, 1.25, 0.125)
    vectors = SingularVectors(0.1, 0.9, 2, 3)
    alignment = AlignmentReport((space,), 4, 10.0, 2.5, 0.2, 1e-7, vectors)
    client = ClientReport(
        2**64 - 1, "accepted", "none", 60.0, 10, 20, 3.5, 2.5, alignment, {"loss": 0.5}, 0.25, 30, 1.5, -0.5, True
    )  # fmt: skip
    encoding = Encoding(GramForm(GramKind.sketch, 8), MomentKind.float16, 65, 2)
    stage = StageReport("fuse", 4.0, 0.5, (client,), {("w", "b"): encoding})
    path = PathSums((0.0, 1.0), (1.0, 2.0), (1.5, 2.5), (3.0, 4.0), (5.0, 6.0), 60.0, 1)
    probe = ServerProbe((7,), 3, (ProbedPath(7, 8, path),), (ProbedPath(9, 7, path),), 0.3, 0.9, 1.0, 40)
    return RoundReport(
        run_id="run",
        round=2,
        rounds=9,
        recipe="regmean",
        finished=datetime(2026, 11, 22, 9, 30, 0, 250_000, tzinfo=UTC),
        seconds=5.5,
        stages=(stage,),
        path=path,
        fused_path=path,
        update_cosines=UpdateCosines(3, 100, 1000, 2.0, 0.5, 0.25, 0.125, 0.01),
        variance=(LayerVariance("w", 0.5),),
        probe=probe,
        train_metrics={"loss": 0.4},
        evaluate_metrics={"accuracy": 0.8},
        server_metrics={"server-accuracy": 0.7},
        model_digest=b"\x00\xff",
        peak_rss_bytes=2**40,
        last=True,
        problem="none",
        incidents=(Incident("loss_rose", "loss 0.5 to 2"),),
        choice=Choice("fitted", 2, "average", 0.25, 0.875, 0.5, 0.75, 151.0, 1, 0.5, 0.125),
        step=Step(0.25, 1.5, 0.125, 0.5, 151.0),
    )


def test_the_bytes_of_a_report_are_those_that_were_committed():
    assert full_report().to_bytes() == GOLDEN.read_bytes()
    assert RoundReport.from_bytes(GOLDEN.read_bytes()) == full_report()


def test_the_golden_report_leaves_no_field_at_its_default():
    def check(message):
        assert {field.name for field, _ in message.ListFields()} == set(message.DESCRIPTOR.fields_by_name)
        for field, value in message.ListFields():
            if field.message_type and field.message_type.file is message.DESCRIPTOR.file:
                entries = value.values() if hasattr(value, "values") else value
                for entry in entries if field.is_repeated else [value]:
                    if hasattr(entry, "ListFields"):
                        check(entry)

    check(full_report().to_message())


def test_equal_reports_have_equal_bytes_also_where_a_metric_is_nan():
    first, second = (RoundReport("run", 1, train_metrics={"loss": float("nan"), "a": 1.0}) for _ in range(2))
    assert first != second
    assert first.to_bytes() == second.to_bytes()


@pytest.mark.parametrize(
    ("read", "data", "advice"),
    [
        (RoundReport.from_bytes, b"\xff", "not a round report"),
        (RoundReport.from_json, "not json", "not a round report"),
        (RoundReport.from_json, b'{"round": "\xff"}', "not a round report"),
        (RoundReport.from_json, '{"schema_version": 1, "round": 1}', "schema_version is 1"),
    ],
)
def test_what_is_not_a_report_of_this_version_is_refused(read, data, advice):
    with pytest.raises(ReportError, match=advice):
        read(data)


def test_a_name_that_this_version_does_not_know_is_refused_with_those_that_it_knows():
    message = pb.GramForm(kind="newest", size=1)
    with pytest.raises(ConversionError, match="'newest' is not a GramKind; this version knows tri"):
        from_protobuf(GramForm, message)


def test_a_time_that_no_datetime_can_hold_is_refused_by_the_name_of_its_field():
    message = full_report().to_message()
    message.finished.seconds = 2**60
    with pytest.raises(ReportError, match="finished is not a time"):
        RoundReport.from_message(message)
