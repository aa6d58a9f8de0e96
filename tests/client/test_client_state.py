import pytest
import torch
from flwr.app import Context, MetricRecord, RecordDict

from fedbasin.client.client_state import (
    forget,
    fused_pieces,
    keep_fused,
    keep_sent,
    keep_start,
    keep_trained,
    round_start,
    sent_reply,
    trained_reply,
)
from fedbasin.proto.header import STATISTICS
from fedbasin.proto.reply import LayerStatistic, Reply
from fedbasin.proto.request import Refit, Request

STATE = {"w": torch.randn(2, 3), "half": torch.randn(2).bfloat16(), "count": torch.tensor(3)}
METRICS = {"loss": 0.5, "losses": [0.5, 0.25]}


@pytest.fixture
def context():
    return Context(1, 7, {}, RecordDict(), {})


def request(server_round):
    return Request("fuse", round=server_round, weight_key="images")


def keep(context, server_round, state=STATE):
    reply = Reply(server_round, "fuse", parameters=state, metrics=METRICS, examples=9.0)
    keep_trained(context, request(server_round), reply)


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[n], other[n]) for n in other)


def test_what_is_kept_comes_back_in_its_round(context):
    keep(context, 3)
    reply = trained_reply(context, request(3))
    assert (reply.metrics, reply.examples) == (METRICS, 9)
    assert equal(reply.parameters, STATE)


def test_of_another_round_there_is_nothing(context):
    assert trained_reply(context, request(3)) is None
    keep(context, 3)
    assert trained_reply(context, request(4)) is None


def test_the_newest_replaces_the_one_before(context):
    keep(context, 3)
    keep(context, 4, {"w": torch.zeros(1)})
    assert trained_reply(context, request(3)) is None
    assert list(trained_reply(context, request(4)).parameters) == ["w"]


def sent(server_round, *, packed=True):
    statistics = (LayerStatistic(("w",), "fisher", (torch.ones(2, 3),)),)
    state = STATE if packed else {"w": STATE["w"], "count": STATE["count"]}
    reply = Reply(server_round, "fuse", parameters=state, statistics=statistics, examples=9.0)
    return reply.to_content(request(server_round), packed=packed)


@pytest.mark.parametrize("packed", [True, False])
def test_what_was_sent_comes_back_in_its_round_alone_and_without_statistics(context, packed):
    assert sent_reply(context, request(3)) is None
    content = sent(3, packed=packed)
    assert STATISTICS in content
    keep_sent(context, request(3), content)
    reply = sent_reply(context, request(3))
    assert equal(reply.parameters, {name: STATE[name] for name in reply.parameters})
    assert set(reply.parameters) >= {"w", "count"}
    assert (reply.examples, reply.statistics) == (9, ())
    assert trained_reply(context, request(3)) is None
    assert sent_reply(context, request(4)) is None


def piece(sequence, state=STATE, server_round=3):
    return Request("refit", round=server_round, anchor=state, refit=Refit(sequence=sequence))


def receive(context, *pieces):
    for request in pieces:
        keep_fused(context, request, request.to_content(packed=True))


def test_pieces_come_back_in_their_order_and_none_where_one_is_missing(context):
    receive(context, piece(0), piece(1, {"w": torch.ones(2, 3)}))
    first, second = fused_pieces(context, piece(1))
    assert first.keys() == STATE.keys()
    assert torch.equal(second["w"], torch.ones(2, 3))
    assert fused_pieces(context, piece(2)) == []
    assert fused_pieces(context, piece(1, server_round=4)) == []


def test_a_first_piece_drops_those_of_an_earlier_refit(context):
    receive(context, piece(0), piece(1), piece(0))
    assert fused_pieces(context, piece(1)) == []


def test_models_are_kept_in_the_records_that_they_came_in(context):
    requests = [piece(0), piece(1)]
    contents = [request.to_content(packed=True) for request in requests]
    for request, content in zip(requests, contents, strict=True):
        keep_fused(context, request, content)
    keep_start(context, requests[0], contents[0])
    stored = [context.state[name] for name in context.state if name.endswith("/arrays")]
    assert len(stored) == 3
    assert {id(record) for record in stored} == {id(content["arrays"]) for content in contents}
    assert equal(round_start(context), STATE)


def test_what_is_forgotten_is_gone_and_the_apps_own_state_stays(context):
    context.state["mine"] = MetricRecord({"rounds": 1})
    forget(context)
    keep(context, 3)
    keep_sent(context, request(3), sent(3))
    receive(context, piece(0))
    forget(context)
    assert trained_reply(context, request(3)) is None
    assert sent_reply(context, request(3)) is None
    assert list(context.state) == ["mine"]


def test_what_was_sent_of_a_large_model_comes_back_in_a_stage_that_brings_no_tensors(context):
    model = {f"layers.{index}.weight": torch.zeros(1) for index in range(300)}
    content = Reply(3, "fuse", parameters=model, examples=9.0).to_content(request(3), packed=True)
    keep_sent(context, request(3), content)
    assert equal(sent_reply(context, request(3)).parameters, model)
