import pytest
import torch
from flwr.app import Context, MetricRecord, RecordDict

from fedbasin.client.client_state import (
    begun,
    forget,
    fused_pieces,
    keep,
    keep_begun,
    keep_fused,
    keep_sent,
    kept,
    sent,
)
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire

STATE = {"w": torch.randn(2, 3), "half": torch.randn(2).bfloat16(), "count": torch.tensor(3)}
METRICS = {"loss": 0.5, "num-examples": 9.0}


@pytest.fixture
def context():
    return Context(1, 7, {}, RecordDict(), {})


def test_what_is_kept_comes_back_in_its_round(context):
    keep(context, 3, STATE, METRICS)
    state, metrics = kept(context, 3)
    assert metrics == METRICS
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


def test_of_another_round_there_is_nothing(context):
    assert kept(context, 3) is None
    keep(context, 3, STATE, METRICS)
    assert kept(context, 4) is None


def test_the_newest_replaces_the_one_before(context):
    keep(context, 3, STATE, METRICS)
    keep(context, 4, {"w": torch.zeros(1)}, {"num-examples": 1.0})
    assert kept(context, 3) is None
    assert list(kept(context, 4)[0]) == ["w"]


def reply(server_round):
    arrays, specs = packing.pack(STATE)
    content = RecordDict({wire.ARRAYS: arrays})
    wire.write(content, pb.UpdateHeader(round=server_round, tensors=specs))
    return content


def test_what_was_sent_comes_back_in_its_round_alone(context):
    assert sent(context, 3) is None
    keep_sent(context, reply(3))
    found = sent(context, 3)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)
    assert kept(context, 3) is None
    assert sent(context, 4) is None


def piece(sequence, state=STATE, server_round=3):
    arrays, specs = packing.pack(state)
    content = RecordDict({wire.ARRAYS: arrays})
    fit = pb.Fit(sequence=sequence)
    wire.write(content, pb.Request(round=server_round, anchor=specs, fit=fit))
    return content


def test_pieces_come_back_in_their_order_and_none_where_one_is_missing(context):
    keep_fused(context, piece(0))
    keep_fused(context, piece(1, {"w": torch.ones(2, 3)}))
    first, second = fused_pieces(context, 3, 1)
    assert first.keys() == STATE.keys()
    assert torch.equal(second["w"], torch.ones(2, 3))
    assert fused_pieces(context, 3, 2) == []
    assert fused_pieces(context, 4, 1) == []


def test_a_first_piece_drops_those_of_an_earlier_fit(context):
    for sequence in (0, 1, 0):
        keep_fused(context, piece(sequence))
    assert fused_pieces(context, 3, 1) == []


def test_models_are_kept_in_the_records_that_they_came_in(context):
    messages = [piece(0), piece(1)]
    for message in messages:
        keep_fused(context, message)
    keep_begun(context, messages[0])
    stored = [context.state[name] for name in context.state if name.endswith("-arrays")]
    assert {id(record) for record in stored} == {id(m[wire.ARRAYS]) for m in messages}
    assert all(torch.equal(begun(context)[name], STATE[name]) for name in STATE)


def test_what_is_forgotten_is_gone_and_the_apps_own_state_stays(context):
    context.state["mine"] = MetricRecord({"rounds": 1})
    forget(context)
    keep(context, 3, STATE, METRICS)
    keep_sent(context, reply(3))
    keep_fused(context, piece(0))
    forget(context)
    assert kept(context, 3) is None
    assert sent(context, 3) is None
    assert list(context.state) == ["mine"]
