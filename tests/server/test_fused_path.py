"""From the new global model to each client's own: what the run reports is what the two models say directly."""

import base64
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.header import HEADER, read_header
from fedbasin.strategies.diagnostics.barrier import along, linear_barrier, midpoint_gap
from fedbasin.strategies.diagnostics.evaluation import evaluate
from fedbasin.strategies.diagnostics.model_pairs import from_fused
from fedbasin.strategies.symmetry.symmetry import parse
from fedbasin.strategies.tensors.state import interpolate
from tests import running, tiny

NODES = [100, 101, 102]
POINTS = 5


class Run:
    """A run that remembers what every client sent last; `forgetful` has lost its context by then."""

    def __init__(self, folder: Path, tamper=None, rounds=1, symmetry=None, forgetful=None, **config):
        config = {"fused_points": POINTS, "folder": str(folder)} | config
        self.app = tiny.make_app()
        self.federation = tiny.federation(app=self.app, **config)
        self.sent, self.forgetful = {}, forgetful
        self.federation.tamper = {node: partial(self.seen, node, tamper or {}) for node in NODES}
        symmetry = symmetry or tiny.symmetry()
        result = running.run(self.federation, tiny.net(), rounds, symmetry=symmetry)
        self.model, self.report = result.state_dict, result.reports[-1]

    def seen(self, node, tamper, reply):
        is_model = not reply.has_error() and "arrays" in reply.content
        if is_model and read_header(reply.content, pb.Reply()).stage == "fuse":
            self.sent[node] = reply.content["arrays"].to_torch_state_dict()
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
        return {client.node_id: client.outcome for client in self.clients(stage)}

    def clients(self, stage):
        (report,) = [report for report in self.report.stages if report.stage == stage]
        return report.clients


def same(sums, direct):
    assert sums.points == direct.points
    assert sums.loss_after == pytest.approx(direct.loss, abs=1e-6)
    assert sums.correct_after == direct.correct
    assert sums.examples == direct.examples
    assert (sums.loss_before, sums.correct_before) == ((), ())


@pytest.mark.parametrize("recipe", ["fedavg", "regmean"])
@pytest.mark.parametrize("begin", ["shared", "own"])
@pytest.mark.parametrize("align", ["client", "off"])
def test_the_sums_are_those_of_the_same_models_on_the_pooled_data(tmp_path, recipe, begin, align):
    run = Run(tmp_path, recipe=recipe, start=begin, align=align)
    sums, direct = run.report.fused_path, run.direct(NODES)
    same(sums, direct)
    assert sums.clients == 3
    means = [value / sums.examples for value in sums.loss_after]
    for measure in (linear_barrier, midpoint_gap):
        expected = measure(direct.points, direct.mean_loss)
        assert measure(sums.points, means) == pytest.approx(expected, abs=1e-6)
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
    assert bare.report.fused_path is None
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
        if "arrays" not in reply.content:
            header = read_header(reply.content, pb.Reply())
            change(header)
            # Not by write_header, which would set the schema version right.
            text = base64.b64encode(header.SerializeToString()).decode()
            reply.content[HEADER] = ConfigRecord({HEADER: text})
        return reply

    return spoil


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda h: h.path.loss_after.__setitem__(1, math.nan), "non_finite"),
        (lambda h: h.path.correct_after.__setitem__(1, 1e9), "malformed"),
        (lambda h: h.path.loss_after.pop(), "malformed"),
        (lambda h: h.path.points.pop(), "missing_statistic"),
        (lambda h: h.MergeFrom(pb.Reply(round=7)), "wrong_round"),
        (lambda h: h.MergeFrom(pb.Reply(anchor_digest=b"x")), "wrong_anchor"),
        (lambda h: h.MergeFrom(pb.Reply(schema_version=9)), "schema_version"),
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
    assert not any(client.alignment for client in run.clients("evaluate"))


def test_a_model_that_alignment_made_another_function_of_is_refused_by_name(tmp_path):
    forgetful = parse("hidden  S(6)  0.weight[0] 3.weight[1]")
    run = Run(tmp_path, symmetry=forgetful, start="own", barrier_points=2, quorum=0.3)
    # The first client is the anchor itself; the two others are moved, and wrongly.
    assert run.outcomes("fuse") == {100: "accepted", 101: "function_changed", 102: "function_changed"}
    details = {client.node_id: client.detail for client in run.clients("fuse")}
    assert details[101].startswith("its own loss changed by ")
    assert torch.equal(run.model["0.weight"], run.sent[100]["0.weight"])
    assert run.report.fused_path.clients == 1
