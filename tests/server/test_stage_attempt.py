"""An attempt at a stage asks, waits, adds and reports; too few accepted clients end a run by name."""

import time
import weakref

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing
from fedbasin.proto.header import read_header, write_header
from fedbasin.proto.report import PathSums
from fedbasin.proto.request import Request
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.exchange.stage_attempt import RoundContext, StageAttempt, StageLimits
from fedbasin.server.exchange.streaming_grid import StreamingGrid
from fedbasin.strategies.diagnostics.loss_path import path_losses
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.evaluate import Evaluate
from fedbasin.strategies.round.fuse import fusing_stage
from tests import running, tiny
from tests.waiting import LONG

NODES = [100, 101, 102]


def silent(reply):
    return None


def gone(request):
    """Return what the SuperLink answers for a node that it has lost; it signs with its own id."""
    error = Message(Error(5, "gone"), reply_to=request)
    error.metadata.__dict__["_src_node_id"] = 1
    return error


def attempt(federation, limits=None, make=None, client_metrics_fn=None, points=0, packed=False):
    """Make one attempt at a stage, at the fusion if no other is given."""
    anchor, grid = tiny.net().state_dict(), StreamingGrid(federation.grid(), 0.001)

    def fuse():
        request = Request("", path_points=points)
        return fusing_stage(anchor, RECIPES["fedavg"], request, None, "off")

    limits, context = limits or StageLimits(LONG, 1.0), RoundContext(1, {"lr": 0.1}, packed)
    made = StageAttempt(make or fuse, anchor, NODES, context, limits, client_metrics_fn=client_metrics_fn)
    early_end = limits.early_end(len(NODES))
    made.add_all(grid.stream(made.messages, limits.timeout_seconds, early_end))
    assert made.accepted >= made.needed
    return made.finish()


def start(federation, folder, **settings):
    """Run one round without alignment and evaluation."""
    arguments = {"align": "off", "fraction_evaluate": 0.0, "folder": str(folder)} | settings
    return running.run(federation, tiny.net(), **arguments)


def test_a_stage_without_a_quorum_asks_the_failed_anew_and_then_names_everybody(tmp_path):
    federation = tiny.federation()
    federation.tamper = {100: lambda reply: gone(federation.asked[-1])}
    federation.contexts[102].run_config["fail"] = True
    with pytest.raises(QuorumLostError) as lost:
        start(federation, tmp_path, quorum=0.5, attempts=3)
    asked = [message.metadata.dst_node_id for message in federation.asked]
    assert asked == [*NODES, 100, 102, 100, 102]
    message = str(lost.value)
    for part in ("1 of 3 clients accepted, 2 needed, after 3 attempts", "fedbasin.quorum"):
        assert part in message
    assert "node 100: unavailable, error 5: gone" in message
    assert "node 102: client_error, error 2: RuntimeError: out of memory" in message
    assert "node 101" not in message
    assert [c.node_id for c in lost.value.report.clients if c.outcome != "accepted"] == [100, 102]


def test_a_second_attempt_asks_for_what_is_missing_and_keeps_the_rest(tmp_path):
    federation = tiny.federation()

    def back_again(reply):
        return reply if len(federation.asked) > 3 else gone(federation.asked[-1])

    federation.tamper = {101: back_again}
    result = start(federation, tmp_path / "a", quorum=1.0, attempts=2)
    assert len(federation.asked) == 4
    undisturbed = start(tiny.federation(), tmp_path / "b")
    (stage,) = result.reports[0].stages
    assert [c.outcome for c in stage.clients] == ["accepted"] * 3
    for name, tensor in undisturbed.state_dict.items():
        assert torch.equal(result.state_dict[name], tensor)


@pytest.mark.parametrize(("quorum", "asked", "needed"), [(0.5, 3, 2), (0.01, 3, 1), (1.0, 3, 3), (0.5, 4, 2)])
def test_a_quorum_is_a_share_of_the_asked_and_at_least_one(quorum, asked, needed):
    limits = StageLimits(quorum=quorum)
    assert limits.needed(asked) == needed
    assert limits.early_end(asked) is None
    assert StageLimits(quorum=quorum, grace_seconds=0.0).early_end(asked).replies == needed


def test_once_a_quorum_has_answered_the_rest_is_waited_for_a_grace_alone():
    federation = tiny.federation(tamper={102: silent})
    result = attempt(federation, StageLimits(LONG, quorum=0.6, grace_seconds=0.05))
    assert result.report.seconds < LONG
    assert sorted((c.node_id, c.outcome) for c in result.report.clients) == [
        (100, "accepted"),
        (101, "accepted"),
        (102, "timeout"),
    ]
    assert "2 others were enough" in result.report.clients[-1].detail


def test_no_message_is_held_once_it_is_checked():
    replies, alive = [], []

    def watch(reply):
        replies.append(weakref.ref(reply))
        return reply

    def count(node, state):
        del state
        alive.append(sum(reply() is not None for reply in replies))
        return {}

    attempt(tiny.federation(tamper=dict.fromkeys(NODES, watch)), client_metrics_fn=count)
    assert alive == [0, 0, 0]


def test_metrics_of_accepted_clients_are_made_and_reported():
    def measure(node, state):
        return {"norm": float(state["0.weight"].norm()), "node": node}

    federation = tiny.federation(tamper={101: silent})
    limits = StageLimits(LONG, quorum=0.5, grace_seconds=0.0)
    result = attempt(federation, limits, client_metrics_fn=measure)
    metrics = {c.node_id: dict(c.metrics) for c in result.report.clients}
    assert metrics[100]["node"] == 100
    assert metrics[100]["norm"] > 0
    assert metrics[101] == {}


def test_metrics_are_means_weighted_by_examples():
    result = attempt(tiny.federation())
    clients = result.report.clients
    assert [c.examples for c in clients] == [20, 21, 22]
    weighted = sum(c.metrics["loss"] * c.examples for c in clients) / 63
    assert result.metrics == {"loss": pytest.approx(weighted)}
    assert "num-examples" not in clients[0].metrics


def test_evaluation_gives_metrics_and_the_model_unchanged():
    anchor = tiny.net().state_dict()
    result = attempt(tiny.federation(), make=lambda: Evaluate(anchor))
    assert set(result.metrics) == {"accuracy"}
    assert result.model.keys() == anchor.keys()
    assert all(torch.equal(result.model[name], anchor[name]) for name in anchor)


@pytest.mark.parametrize("packed", [True, False])
def test_the_report_counts_bytes_and_seconds(packed):
    result = attempt(tiny.federation(), packed=packed)
    state = tiny.net().state_dict()
    sent = packing.pack(state)[0] if packed else ArrayRecord(state)
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

    assert attempt(tiny.federation(), make=slowly).report.server_seconds > 0.2


def test_the_apps_own_settings_and_the_round_reach_its_clients():
    federation = tiny.federation()
    attempt(federation)
    assert dict(federation.asked[0].content["config"]) == {"lr": 0.1, "server-round": 1}


def test_path_sums_are_those_of_the_clients_pooled_data():
    federation, states = tiny.federation(), {}

    def remember(node, state):
        states[node] = {name: tensor.clone() for name, tensor in state.items()}
        return {}

    result = attempt(federation, client_metrics_fn=remember, points=3)
    anchor, model = tiny.net().state_dict(), tiny.net()
    paths = [
        path_losses(model, anchor, {**anchor, **states[n]}, tiny.batches(federation.contexts[n]), 3) for n in NODES
    ]
    pooled = paths[0] + paths[1] + paths[2]
    assert result.path.points == pooled.points == (0, 0.5, 1)
    assert result.path.loss_before == pytest.approx(pooled.loss)
    assert result.path.loss_after == pytest.approx(pooled.loss)
    assert result.path.correct_before == pooled.correct
    assert result.path.correct_after == pooled.correct
    assert result.path.examples == 63


def test_a_path_that_nobody_asked_for_is_left_out():
    def volunteer(reply):
        header = read_header(reply.content, pb.Reply())
        header.path.CopyFrom(pb.PathSums(points=[0, 1], loss_before=[1, 2], examples=9))
        write_header(reply.content, header)
        return reply

    result = attempt(tiny.federation(tamper={101: volunteer}))
    assert result.path is None
    assert [c.outcome for c in result.report.clients] == ["accepted"] * 3


def test_adding_paths_to_nothing_gives_their_sum():
    path = PathSums((0, 1), (1, 2), (3, 4), (5, 6), (7, 8), examples=9, clients=1)
    total = PathSums()
    total += path
    assert total == path
    total += path
    assert total == PathSums((0, 1), (2, 4), (6, 8), (10, 12), (14, 16), examples=18, clients=2)
    assert total + PathSums() == total
    assert path.examples == 9
