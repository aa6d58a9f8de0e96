"""A stage asks, waits, folds and reports; too few good answers end it by name."""

import time
import weakref

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message

from fedbasin.client.measure.loss_path import path_losses
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.server.run.client_paths import add_path
from fedbasin.server.run.stage_loop import Budget, Question, QuorumLostError, run_stage
from fedbasin.server.run.streaming_grid import StreamingGrid
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.stages import Ask, Evaluate, fusing
from tests import tiny

NODES = [100, 101, 102]


def silent(reply):
    return None


def gone(request):
    """What the SuperLink answers for a node that it has lost; it signs with its own id."""
    error = Message(Error(5, "gone"), reply_to=request)
    error.metadata.__dict__["_src_node_id"] = 1
    return error


def fuse_stage(anchor, **ask):
    return lambda: fusing(anchor, RECIPES["fedavg"], Ask(**ask), "off")


def run(federation, budget=None, make=None, observe=None, ask=None, **how):
    anchor = tiny.net().state_dict()
    make = make or fuse_stage(anchor, **(ask or {}))
    question = Question(make, anchor, 1, ConfigRecord({"lr": 0.1}), observe)
    grid = StreamingGrid(federation.grid(**how), 0.001)
    return run_stage(grid, question, NODES, budget or Budget(60.0, quorum=1.0))


def test_a_stage_without_a_quorum_is_asked_anew_and_then_names_everybody():
    federation = tiny.federation()
    federation.tamper = {100: lambda reply: gone(federation.asked[-1])}
    federation.contexts[102].run_config["fail"] = True
    with pytest.raises(QuorumLostError) as lost:
        run(federation, Budget(60.0, quorum=0.5, attempts=3))
    assert len(federation.asked) == 3 * len(NODES)
    message = str(lost.value)
    for part in ("1 of 3 clients accepted, 2 needed, in each of 3 attempts", "fedbasin.quorum"):
        assert part in message
    assert "node 100: unavailable, error 5: gone" in message
    assert "node 102: client_error, error 2: RuntimeError: out of memory" in message
    assert "node 101" not in message
    assert [c.node_id for c in lost.value.report.clients if c.outcome != "accepted"] == [100, 102]


def test_a_second_attempt_that_succeeds_counts_alone():
    federation = tiny.federation()

    def back_again(reply):
        return reply if len(federation.asked) > 3 else gone(federation.asked[-1])

    federation.tamper = {101: back_again}
    result = run(federation, Budget(60.0, quorum=1.0, attempts=2))
    assert len(federation.asked) == 6
    undisturbed = run(tiny.federation())
    assert [c.outcome for c in result.report.clients] == ["accepted"] * 3
    for name, tensor in undisturbed.model.items():
        assert torch.equal(result.model[name], tensor)


@pytest.mark.parametrize(
    ("quorum", "asked", "needed"), [(0.5, 3, 2), (0.01, 3, 1), (1.0, 3, 3), (0.5, 4, 2)]
)
def test_a_quorum_is_a_share_of_the_asked_and_at_least_one(quorum, asked, needed):
    budget = Budget(quorum=quorum)
    assert budget.needed(asked) == needed
    assert budget.early_end(asked) is None
    assert Budget(quorum=quorum, grace_seconds=0.0).early_end(asked).replies == needed


def test_once_a_quorum_has_answered_the_rest_is_waited_for_a_grace_alone():
    federation = tiny.federation(tamper={102: silent})
    started = time.monotonic()
    result = run(federation, Budget(60.0, quorum=0.6, grace_seconds=0.05))
    assert time.monotonic() - started < 30
    assert sorted((c.node_id, c.outcome) for c in result.report.clients) == [
        (100, "accepted"),
        (101, "accepted"),
        (102, "timeout"),
    ]
    assert "2 others were enough" in result.report.clients[-1].detail


def test_no_reply_is_held_once_it_is_folded():
    replies, alive = [], []

    def watch(reply):
        replies.append(weakref.ref(reply))
        return reply

    def count(node, state):
        del state
        alive.append(sum(reply() is not None for reply in replies))
        return {}

    # The fake grid holds what it has not handed over yet; those behind must be gone.
    run(tiny.federation(tamper=dict.fromkeys(NODES, watch)), observe=count)
    assert alive == [3, 2, 1]
    assert not any(reply() for reply in replies)


def test_observers_see_accepted_clients_and_what_they_say_is_reported():
    def measure(node, state):
        return {"norm": float(state["0.weight"].norm()), "node": node}

    federation = tiny.federation(tamper={101: silent})
    result = run(federation, Budget(60.0, quorum=0.5, grace_seconds=0.0), observe=measure)
    seen = {c.node_id: dict(c.metrics) for c in result.report.clients}
    assert seen[100]["node"] == 100
    assert seen[100]["norm"] > 0
    assert seen[101] == {}


def test_metrics_are_means_weighted_by_examples():
    result = run(tiny.federation())
    clients = result.report.clients
    assert [c.examples for c in clients] == [20, 21, 22]
    weighted = sum(c.metrics["loss"] * c.examples for c in clients) / 63
    assert result.metrics == {"loss": pytest.approx(weighted)}
    assert "num-examples" not in clients[0].metrics


def test_evaluation_gives_metrics_and_the_model_unchanged():
    anchor = tiny.net().state_dict()
    result = run(tiny.federation(), make=lambda: Evaluate(anchor))
    assert set(result.metrics) == {"accuracy"}
    assert result.model.keys() == anchor.keys()
    assert all(torch.equal(result.model[name], anchor[name]) for name in anchor)


def test_the_report_counts_bytes_and_seconds():
    result = run(tiny.federation())
    sent, _ = packing.pack(tiny.net().state_dict())
    for client in result.report.clients:
        assert client.bytes_down == packing.nbytes(sent)
        assert client.bytes_up > 0
        assert client.train_seconds > 0
    report = result.report
    assert report.stage == "fuse"
    assert 0 < report.server_seconds <= report.seconds


def test_preparing_a_stage_counts_as_the_servers_own_work():
    anchor = tiny.net().state_dict()

    def slowly():
        time.sleep(0.2)
        return Evaluate(anchor)

    assert run(tiny.federation(), make=slowly).report.server_seconds > 0.2


def test_the_apps_own_settings_and_the_round_reach_its_clients():
    federation = tiny.federation()
    run(federation)
    assert dict(federation.asked[0].content["config"]) == {"lr": 0.1, "server-round": 1}


def test_path_sums_are_those_of_the_clients_pooled_data():
    federation, states = tiny.federation(), {}

    def remember(node, state):
        states[node] = {name: tensor.clone() for name, tensor in state.items()}
        return {}

    result = run(federation, observe=remember, ask={"path_points": 3})
    anchor, model = tiny.net().state_dict(), tiny.net()
    paths = [
        path_losses(model, anchor, {**anchor, **states[n]}, tiny.batches(federation.contexts[n]), 3)
        for n in NODES
    ]
    pooled = paths[0] + paths[1] + paths[2]
    assert tuple(result.path.points) == pooled.points == (0, 0.5, 1)
    assert tuple(result.path.loss_before) == pytest.approx(pooled.loss)
    assert tuple(result.path.loss_after) == pytest.approx(pooled.loss)
    assert tuple(result.path.correct_before) == pooled.correct
    assert tuple(result.path.correct_after) == pooled.correct
    assert result.path.examples == 63


def test_a_path_that_nobody_asked_for_is_left_out():
    def volunteer(reply):
        header = wire.read_update(reply.content)
        header.path.CopyFrom(pb.PathSums(points=[0, 1], loss_before=[1, 2], examples=9))
        wire.write(reply.content, header)
        return reply

    result = run(tiny.federation(tamper={101: volunteer}))
    assert result.path == pb.PathSums()
    assert [c.outcome for c in result.report.clients] == ["accepted"] * 3


def test_adding_paths_to_nothing_gives_their_sum():
    path = pb.PathSums(
        points=[0, 1],
        loss_before=[1, 2],
        loss_after=[3, 4],
        correct_before=[5, 6],
        correct_after=[7, 8],
        examples=9,
    )
    total = pb.PathSums()
    add_path(total, path)
    add_path(total, path)
    assert total == pb.PathSums(
        points=[0, 1],
        loss_before=[2, 4],
        loss_after=[6, 8],
        correct_before=[10, 12],
        correct_after=[14, 16],
        examples=18,
    )
    assert path.examples == 9
