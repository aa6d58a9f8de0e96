"""Dataclasses become messages and messages dataclasses, field by field, by name."""

import dataclasses
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbasin.proto import encoding, layer_graph, reply, report, request
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.convert import ConversionError, from_protobuf, to_protobuf
from fedbasin.proto.encoding import Encoding, GramForm, GramKind, MomentKind
from fedbasin.proto.layer_graph import BatchNorm, LayerGraph
from fedbasin.proto.report import PathSums, RoundReport, SpaceReport
from fedbasin.proto.request import PathSpec, Refit
from tests.proto.messages import alignments, encodings, graphs, paths, refits

DATACLASSES = {
    cls.__name__: cls
    for module in (encoding, layer_graph, reply, report, request)
    for cls in vars(module).values()
    if dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__
}
# Fields of a header that hold tensors, which travel beside it, and the version, which whoever writes it sets.
BESIDE = {
    "Request": {"anchor", "identity_bounds", "moving"},
    "Reply": {"parameters", "statistics"},
    "LayerStatistic": {"pieces", "moment"},
}


def travelling(cls):
    return {
        field.name
        for field in dataclasses.fields(cls)
        if "record" not in field.metadata and not field.metadata.get("local")
    }


@pytest.mark.parametrize("name", DATACLASSES)
def test_a_dataclass_has_the_fields_of_its_message(name):
    descriptor = getattr(pb, name).DESCRIPTOR
    fields = {field.name for field in descriptor.fields} - BESIDE.get(name, set())
    if name in ("Request", "Reply"):
        fields -= {"schema_version"}
    assert travelling(DATACLASSES[name]) == fields


@pytest.mark.parametrize("name", DATACLASSES)
def test_a_field_that_may_be_none_is_optional_in_its_message(name):
    for field in dataclasses.fields(DATACLASSES[name]):
        if field.name in travelling(DATACLASSES[name]) and "None" in str(field.type):
            number = getattr(pb, name).DESCRIPTOR.fields_by_name[field.name]
            assert number.has_presence, field.name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (alignments, pb.AlignmentReport),
        (encodings, pb.Encoding),
        (graphs, pb.LayerGraph),
        (paths, pb.PathSums),
        (refits, pb.Refit),
    ],
    ids=["alignment", "encoding", "graph", "path", "refit"],
)
@given(data=st.data())
def test_a_dataclass_that_is_written_is_read(values, message, data):
    value = data.draw(values)
    filled = to_protobuf(value, message())
    assert from_protobuf(type(value), message.FromString(filled.SerializeToString())) == value


def test_an_optional_field_knows_nothing_from_zero():
    absent, zero = SpaceReport("s", False, 0.0, 0.0), SpaceReport("s", False, 0.0, 0.0, 1.0, 0.0)
    messages = [to_protobuf(value, pb.SpaceReport()) for value in (absent, zero)]
    assert [m.HasField("largest_angle") for m in messages] == [False, True]
    assert [from_protobuf(SpaceReport, m).largest_angle for m in messages] == [None, 0.0]


def test_an_empty_message_is_there_and_is_not_none():
    filled = to_protobuf(Refit(path=PathSpec(0.0, 0.0)), pb.Refit())
    assert filled.HasField("path")
    assert from_protobuf(Refit, filled).path == PathSpec(0.0, 0.0)
    assert from_protobuf(Refit, to_protobuf(Refit(), pb.Refit())).path is None


def test_a_head_of_no_tensor_is_no_missing_head():
    graphs = [LayerGraph((), head) for head in (None, (), ("w",))]
    heads = [from_protobuf(LayerGraph, to_protobuf(g, pb.LayerGraph())).head for g in graphs]
    assert heads == [None, (), ("w",)]


def test_enumerations_travel_by_name():
    value = Encoding(GramForm(GramKind.sketch, 3), MomentKind.byte)
    filled = to_protobuf(value, pb.Encoding())
    assert (filled.gram.kind, filled.moment) == ("sketch", "byte")
    with pytest.raises(ConversionError, match=r"'spiral' is not a GramKind; .* triangle, half"):
        from_protobuf(GramForm, pb.GramForm(kind="spiral"))


def test_times_and_maps_of_numbers_travel():
    value = RoundReport("r", 1, finished=datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC), train_metrics={"a": 0.5})
    read = from_protobuf(RoundReport, to_protobuf(value, pb.RoundReport()))
    assert (read.finished, read.train_metrics) == (value.finished, {"a": 0.5})


def test_values_are_read_as_tuples_and_dicts_that_cannot_be_of_the_message():
    filled = to_protobuf(PathSums((0.0, 1.0)), pb.PathSums())
    read = from_protobuf(PathSums, filled)
    filled.points.append(2.0)
    assert read.points == (0.0, 1.0)


class Colour(Enum):
    red = "red"


@dataclass(frozen=True)
class Norm:
    """A dataclass of other fields than its message."""

    name: str
    colour: Colour


def test_a_dataclass_of_fields_that_its_message_lacks_is_an_error_of_ours():
    with pytest.raises(KeyError, match="colour"):
        to_protobuf(Norm("n", Colour.red), pb.BatchNorm())
    assert from_protobuf(BatchNorm, pb.BatchNorm(name="n", eps=0.5)) == BatchNorm("n", 0.5)
