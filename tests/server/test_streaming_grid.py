"""The grid that streams replies: order, deadlines, quorums, retries, and that no reply is held."""

import gc
import weakref
from itertools import pairwise

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import RunNotRunningException

from fedbasin.server.exchange.streaming_grid import NodeReply, Quorum, StreamingGrid, TooFewNodesError, await_nodes
from tests.server.clock import Clock
from tests.server.fake_grid import SUPERLINK_NODE_ID, FakeGrid, http_error

NEVER = float("inf")


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    made = Clock(monkeypatch)
    yield made
    made.close()


def echo(message):
    return Message(message.content, reply_to=message)


def to(nodes):
    return [Message(RecordDict(), node, "train") for node in nodes]


def streaming(*args, patience_seconds=5.0, **kwargs):
    return StreamingGrid(FakeGrid(*args, **kwargs), 0.005, patience_seconds)


def test_replies_come_in_the_order_in_which_the_nodes_answer():
    grid = streaming([2, 3, 4], echo, latency={2: 0.2, 3: 0.0, 4: 0.1}.__getitem__)
    replies = list(grid.stream(to([2, 3, 4]), 5))
    assert [reply.node_id for reply in replies] == [3, 4, 2]
    assert all(reply.problem == "" and reply.message.has_content() for reply in replies)
    assert all(early.seconds < late.seconds for early, late in pairwise(replies))
    assert replies[-1].seconds == pytest.approx(0.2, abs=0.01)


def test_a_reply_is_handed_over_while_others_are_still_out():
    grid = streaming([2, 3], echo, latency={2: 0.0, 3: NEVER}.__getitem__)
    assert next(grid.stream(to([2, 3]), 60)).node_id == 2


def test_a_silent_node_is_one_reply_without_message_at_the_deadline():
    grid = streaming([2, 3], lambda m: echo(m) if m.metadata.dst_node_id == 2 else None)
    answered, silent = grid.stream(to([2, 3]), 0.2)
    assert answered.node_id == 2
    assert (silent.node_id, silent.message) == (3, None)
    assert "no reply within 0.2 s" in silent.problem
    assert silent.seconds == pytest.approx(0.2)


def test_errors_made_by_the_superlink_are_attributed_to_the_node_that_was_asked():
    def lost(message):
        reply = Message(Error(5, "node lost"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return reply

    (reply,) = streaming([7], lost).stream(to([7]), 5)
    assert (reply.node_id, reply.problem) == (7, "error 5: node lost")
    assert reply.message.metadata.src_node_id == SUPERLINK_NODE_ID


def test_a_quorum_ends_the_wait_after_its_grace():
    grid = streaming([2, 3, 4], echo, latency={2: 0.0, 3: 0.1, 4: 30.0}.__getitem__)
    replies = list(grid.stream(to([2, 3, 4]), 60, Quorum(1, grace_seconds=0.3)))
    assert replies[2].seconds == pytest.approx(0.3, abs=0.01)
    assert [reply.node_id for reply in replies] == [2, 3, 4]
    assert replies[2] == NodeReply(4, None, replies[2].seconds, "not waited for: 2 others were enough")


def test_errors_do_not_count_towards_the_quorum():
    def answer(message):
        bad = message.metadata.dst_node_id == 2
        return Message(Error(2, "crash"), reply_to=message) if bad else echo(message)

    grid = streaming([2, 3], answer, latency={2: 0.0, 3: 0.1}.__getitem__)
    replies = list(grid.stream(to([2, 3]), 5, Quorum(1)))
    assert [reply.problem for reply in replies] == ["error 2: crash", ""]


def test_the_grid_holds_no_reply_once_it_was_handed_over():
    grid = streaming(range(2, 7), echo, latency=lambda node: 0.02 * node)
    gone = []
    gc.disable()  # what remains must go by itself
    try:
        replies = grid.stream(to(range(2, 7)), 5)
        for _ in range(5):
            reply = next(replies)
            gone.append(weakref.ref(reply.message))
            del reply
            assert [ref() for ref in gone] == [None] * len(gone)
    finally:
        gc.enable()


def test_messages_of_send_and_receive_are_not_held_either():
    grid = streaming([2, 3], echo, latency={2: 0.0, 3: 0.05}.__getitem__)
    gc.disable()
    try:
        messages = grid.send_and_receive(to([2, 3]), timeout=5)
        first = weakref.ref(next(messages))
        assert first() is None
        assert next(messages).metadata.src_node_id == 3
        assert list(messages) == []
    finally:
        gc.enable()


def test_server_errors_and_broken_connections_are_retried():
    grid = streaming(
        [2],
        echo,
        push_failures=[http_error(500), httpx.ConnectError("refused"), http_error(429), http_error(408)],
        pull_failures=[http_error(500), httpx.ReadTimeout("slow"), http_error(503), http_error(429)],
    )
    (reply,) = grid.stream(to([2]), 5)
    assert reply.message.has_content()


def test_a_refusal_is_raised_and_not_retried():
    with pytest.raises(httpx.HTTPStatusError):
        list(streaming([2], echo, pull_failures=[http_error(404)]).stream(to([2]), 5))
    with pytest.raises(httpx.HTTPStatusError):
        streaming([2], echo, push_failures=[http_error(403)]).stream(to([2]), 5)


@pytest.mark.parametrize("failure", [RuntimeError, RunNotRunningException])
def test_any_other_failure_of_a_pull_reaches_the_caller(failure):
    with pytest.raises(failure):
        list(streaming([2], echo, pull_failures=[failure()]).stream(to([2]), 5))


def test_a_superlink_that_stays_broken_is_named_as_the_reason_for_silence():
    grid = streaming([2], echo, pull_failures=[http_error(500)] * 1000)
    (reply,) = grid.stream(to([2]), 0.3)
    assert (reply.message, "HTTP 500" in reply.problem) == (None, True)


def test_sending_to_a_broken_superlink_raises_at_the_deadline(clock):
    grid = streaming([2], echo, push_failures=[http_error(500)] * 1000)
    with pytest.raises(httpx.HTTPStatusError):
        grid.stream(to([2]), 5)
    assert 2.5 < clock.now <= 5


def test_replies_nobody_asked_for_are_ignored():
    inner = FakeGrid([2, 3], echo, latency=lambda node: 0.1)
    grid = StreamingGrid(inner, 0.005)
    (silent,) = grid.stream(to([2]), 0.05)
    assert silent.message is None
    late = inner._inbox["message 1"][1]
    inner.strays.append(late)
    (reply,) = grid.stream(to([3]), 5)
    assert (reply.node_id, reply.message.metadata.src_node_id) == (3, 3)


def test_a_reply_that_can_be_pulled_twice_is_given_once():
    grid = streaming([2, 3], echo, latency={2: 0.0, 3: 0.1}.__getitem__, duplicates=True)
    assert [reply.node_id for reply in grid.stream(to([2, 3]), 5)] == [2, 3]


def test_a_node_that_is_gone_is_reported_at_once():
    grid = streaming([2], echo)
    replies = {reply.node_id: reply for reply in grid.stream(to([2, 9]), 5)}
    assert replies[2].message is not None
    assert "did not take" in replies[9].problem
    assert replies[9].seconds == 0


def test_one_slow_upload_neither_holds_up_the_others_nor_passes_the_deadline():
    upload = {2: 30.0, 3: 0.0, 4: 0.0}.__getitem__
    grid = streaming([2, 3, 4], echo, upload_seconds=upload, patience_seconds=0.05)
    replies = list(grid.stream(to([2, 3, 4]), 0.5))
    assert replies[-1].seconds == pytest.approx(0.5)
    assert {reply.node_id for reply in replies if reply.message} == {3, 4}


def test_an_upload_longer_than_the_patience_still_arrives():
    upload = {2: 0.3, 3: 0.0}.__getitem__
    grid = streaming([2, 3], echo, upload_seconds=upload, patience_seconds=0.05)
    assert [reply.node_id for reply in grid.stream(to([2, 3]), 5)] == [3, 2]


def test_the_clock_stands_still_while_the_caller_works(clock):
    grid = streaming([2, 3], echo)
    seen = []
    for reply in grid.stream(to([2, 3]), 0.2):
        seen.append(reply.problem)
        clock.sleep(0.3)
    assert seen == ["", ""]


def test_a_large_round_is_polled_a_few_nodes_at_a_time_and_in_turn():
    inner = FakeGrid(range(2, 42), echo, latency=lambda node: NEVER)
    list(StreamingGrid(inner, 0.01).stream(to(range(2, 42)), 0.4))
    asked = [inner.pulls.count(f"message {i}") for i in range(1, 41)]
    assert min(asked) >= 1
    assert max(asked) - min(asked) <= 1


def test_no_messages_are_no_replies():
    assert list(streaming([], echo).stream([], 5)) == []


def test_the_rest_is_left_to_the_wrapped_grid():
    grid = streaming([2, 3], echo)
    grid.set_run("run")
    assert grid.run == "run"
    assert grid.get_node_ids() == [2, 3]
    assert [node.node_id for node in grid.get_nodes()] == [2, 3]
    (key,) = grid.push_messages(to([2]))
    assert len(grid.pull_messages([key])) == 1


def test_flowers_own_loop_runs_on_it():
    def train(message):
        arrays = ArrayRecord({"w": Array(np.full(3, message.metadata.dst_node_id, np.float32))})
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1, "loss": 0.5})}
        return Message(RecordDict(content), reply_to=message)

    result = FedAvg(fraction_evaluate=0.0).start(
        streaming([2, 4], train), ArrayRecord({"w": Array(np.zeros(3, np.float32))}), num_rounds=2
    )
    assert result.arrays["w"].numpy().tolist() == [3, 3, 3]


def test_nodes_are_waited_for():
    inner = FakeGrid([5], echo, node_failures=[http_error(500)])
    assert await_nodes(inner, 1, 5) == [5]
    inner.node_ids = [9, 3]
    assert await_nodes(inner, 2, 0) == [3, 9]


def test_too_few_nodes_are_counted_in_the_error():
    with pytest.raises(TooFewNodesError, match=r"1 of 3 nodes came online within 0.1 s \(\[5\]\)"):
        await_nodes(FakeGrid([5], echo), 3, 0.1)
