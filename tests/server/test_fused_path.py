"""From the new global model to each client's own: what the run reports is what the two models say directly."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord

from fedbasin.client.measure.loss_path import evaluate
from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto import packing, wire
from fedbasin.server.run.serve import serve
from fedbasin.strategies.diagnostics.barrier import along, linear_barrier, midpoint_gap
from fedbasin.strategies.diagnostics.model_pairs import from_fused
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.tensors.state import interpolate
from tests import tiny

NODES = [100, 101, 102]
POINTS = 5


class Run:
    """A run that remembers what every client sent last; `forgetful` has lost its context by then."""

    def __init__(
        self, folder: Path, tamper=None, rounds=1, symmetry=None, forgetful=None, **config
    ):
        config = {"fused_points": POINTS, "folder": str(folder)} | config
        self.app = tiny.make_app()
        self.federation = tiny.federation(app=self.app, **config)
        self.sent, self.forgetful = {}, forgetful
        self.federation.tamper = {node: partial(self.seen, node, tamper or {}) for node in NODES}
        grid, context = self.federation.grid(), self.federation.server_context()
        symmetry = symmetry or tiny.symmetry()
        result = serve(grid, context, tiny.net(), rounds, symmetry=symmetry)
        self.model, self.report = result.model, result.reports[-1]

    def seen(self, node, tamper, reply):
        if not reply.has_error() and wire.ARRAYS in reply.content:
            header = wire.read_update(reply.content)
            self.sent[node] = packing.unpack(reply.content[wire.ARRAYS], header.tensors)
            if node == self.forgetful:
                self.federation.contexts[node].state.clear()
        return tamper.get(node, lambda same: same)(reply)

    def direct(self, nodes):
        """The sum over these clients of the path that the two models themselves give."""
        paths = [self.path(node) for node in nodes]
        return sum(paths[1:], paths[0])

    def path(self, node):
        own = {**self.model, **self.sent[node]}
        score = partial(evaluate, tiny.net(), batches=tiny.batches(self.federation.contexts[node]))
        return along(lambda t: interpolate(self.model, own, t), score, POINTS)

    def outcomes(self, stage):
        (found,) = [one for one in self.report.stages if one.stage == stage]
        return {client.node_id: client.outcome for client in found.clients}


def same(found: pb.PathSums, direct):
    assert tuple(found.points) == direct.points
    assert tuple(found.loss_after) == pytest.approx(direct.loss, abs=1e-6)
    assert tuple(found.correct_after) == direct.correct
    assert found.examples == direct.examples
    assert (len(found.loss_before), len(found.correct_before)) == (0, 0)


@pytest.mark.parametrize("recipe", ["fedavg", "regmean"])
@pytest.mark.parametrize("begin", ["shared", "own"])
@pytest.mark.parametrize("align", ["client", "off"])
def test_the_sums_are_those_of_the_same_models_on_the_pooled_data(tmp_path, recipe, begin, align):
    run = Run(tmp_path, recipe=recipe, start=begin, align=align)
    found, direct = run.report.fused_path, run.direct(NODES)
    same(found, direct)
    assert found.clients == 3
    means = [value / found.examples for value in found.loss_after]
    for measure in (linear_barrier, midpoint_gap):
        expected = measure(direct.points, direct.mean_loss)
        assert measure(found.points, means) == pytest.approx(expected, abs=1e-6)
    assert math.isfinite(means[0])
    # The diagnostics' own function for several models agrees.
    (node, path), *_ = from_fused(
        run.model,
        {"100": {**run.model, **run.sent[100]}},
        partial(evaluate, tiny.net(), batches=tiny.batches(run.federation.contexts[100])),
        POINTS,
    )
    assert path.loss == pytest.approx(run.path(int(node)).loss)


def test_the_clients_metrics_and_the_model_are_those_of_a_run_without_it(tmp_path):
    probed, bare = Run(tmp_path / "a"), Run(tmp_path / "b", fused_points=0)
    assert probed.report.model_digest == bare.report.model_digest
    assert probed.report.metrics == bare.report.metrics
    assert bare.report.fused_path == pb.PathSums()
    assert not any(len(context.state) for context in bare.federation.contexts.values())


def test_nothing_stays_with_the_clients_once_they_have_evaluated(tmp_path):
    run = Run(tmp_path, rounds=2)
    assert not any(len(context.state) for context in run.federation.contexts.values())
    same(run.report.fused_path, run.direct(NODES))


def test_a_client_that_lost_its_model_evaluates_without_the_path(tmp_path):
    run = Run(tmp_path, forgetful=101)
    assert run.outcomes("evaluate") == dict.fromkeys(NODES, "accepted")
    assert run.report.fused_path.clients == 2
    same(run.report.fused_path, run.direct([100, 102]))
    assert sorted(run.app.trained) == [(node, 1) for node in NODES]


def changed(change):
    """An evaluation with another header; trained models pass."""

    def spoil(reply):
        if wire.ARRAYS not in reply.content:
            header = wire.read_update(reply.content)
            change(header)
            reply.content[wire.HEADER] = ConfigRecord({"header": header.SerializeToString()})
        return reply

    return spoil


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda h: h.path.loss_after.__setitem__(1, math.nan), "non_finite"),
        (lambda h: h.path.correct_after.__setitem__(1, 1e9), "malformed"),
        (lambda h: h.path.loss_after.pop(), "malformed"),
        (lambda h: h.path.points.pop(), "missing_statistic"),
        (lambda h: h.MergeFrom(pb.UpdateHeader(round=7)), "wrong_round"),
        (lambda h: h.MergeFrom(pb.UpdateHeader(anchor_digest=b"x")), "wrong_anchor"),
        (lambda h: h.MergeFrom(pb.UpdateHeader(schema_version=9)), "schema_version"),
    ],
)
def test_a_bad_path_is_named_and_leaves_the_sum_untouched(tmp_path, change, outcome):
    run = Run(tmp_path, {101: changed(change)})
    assert run.outcomes("evaluate") == {100: "accepted", 101: outcome, 102: "accepted"}
    assert run.report.fused_path.clients == 2
    same(run.report.fused_path, run.direct([100, 102]))


def test_what_was_not_asked_for_is_left_out_of_the_sum(tmp_path):
    def boast(header):
        header.path.loss_before.extend([1, 2])
        header.path.clients = 99
        header.alignment.sweeps = 3

    run = Run(tmp_path, dict.fromkeys(NODES, changed(boast)))
    same(run.report.fused_path, run.direct(NODES))
    assert run.report.fused_path.clients == 3
    (stage,) = [one for one in run.report.stages if one.stage == "evaluate"]
    assert not any(client.HasField("alignment") for client in stage.clients)


def test_a_model_that_alignment_made_another_function_of_is_refused_by_name(tmp_path):
    forgetful = parse("hidden  S(6)  0.weight[0] 3.weight[1]")
    run = Run(tmp_path, symmetry=forgetful, start="own", barrier_points=2, quorum=0.3)
    # The first client is the anchor itself; the two others are moved, and wrongly.
    assert run.outcomes("fuse") == {
        100: "accepted",
        101: "function_changed",
        102: "function_changed",
    }
    (stage,) = [one for one in run.report.stages if one.stage == "fuse"]
    details = {client.node_id: client.detail for client in stage.clients}
    assert details[101].startswith("its own loss changed by ")
    assert torch.equal(run.model["0.weight"], run.sent[100]["0.weight"])
    assert run.report.fused_path.clients == 1
