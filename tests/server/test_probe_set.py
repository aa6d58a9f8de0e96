"""The server's probe set: what a run reports is what the kept models say directly."""

import math
from functools import partial

import pytest
import torch

from fedbasin.proto import fedbasin_pb2 as pb
from fedbasin.proto.header import read_header, write_header
from fedbasin.server.run.probe_set import ModelSpool, ProbeSet
from fedbasin.server.run.settings import SettingsError
from fedbasin.strategies.diagnostics.barrier import along
from fedbasin.strategies.diagnostics.ensemble import Ensemble
from fedbasin.strategies.diagnostics.evaluation import evaluate, predict
from fedbasin.strategies.diagnostics.probe_sampling import draw
from fedbasin.strategies.tensors.state import interpolate
from tests import running, tiny
from tests.waiting import LONG


def data():
    inputs = torch.randn(30, tiny.PIXELS, generator=torch.Generator().manual_seed(9))
    return [(inputs, inputs[:, : tiny.CLASSES].argmax(1))]


class Run:
    def __init__(self, folder, clients=4, rounds=1, probe_set=None, tamper=None, **config):
        self.folder, self.sent = folder, {}
        federation = tiny.federation(clients, folder=str(folder), **config)
        federation.tamper = {node: partial(self.seen, node, tamper or {}) for node in federation.contexts}
        probe_set = ProbeSet(tiny.net(3), data()) if probe_set is None else probe_set or None
        result = running.run(federation, tiny.net(), rounds, symmetry=tiny.symmetry(), probe_set=probe_set)
        self.report, self.model = result.reports[-1], result.state_dict

    def seen(self, node, tamper, reply):
        if "arrays" in reply.content:
            tensors = reply.content["arrays"].to_torch_state_dict()
            self.sent[node] = {**tiny.net().state_dict(), **tensors}
        return tamper.get(node, lambda same: same)(reply)

    def direct(self, a, b):
        score = partial(evaluate, tiny.net(), batches=data())
        return along(lambda t: interpolate(a, b, t), score, 5)

    def same(self, sums, direct):
        assert sums.points == direct.points
        assert sums.loss_after == pytest.approx(direct.loss, rel=1e-5)
        assert sums.correct_after == direct.correct
        assert sums.examples == 30


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("runs"), start="own", rounds=2)


def test_every_pair_and_every_way_from_the_new_model_is_walked(run):
    probe = run.report.probe
    assert list(probe.nodes) == [100, 101, 102, 103]
    assert probe.accepted == 4
    assert len(probe.pairs) == 6
    for pair in probe.pairs:
        run.same(pair.path, run.direct(run.sent[pair.a], run.sent[pair.b]))
    assert [(path.a, path.b) for path in probe.fused] == [(0, node) for node in probe.nodes]
    for path in probe.fused:
        run.same(path.path, run.direct(run.model, run.sent[path.b]))


def test_the_ensemble_is_that_of_the_kept_models(run):
    total, targets = Ensemble.zero(30, tiny.CLASSES), data()[0][1]
    for state in run.sent.values():
        total += Ensemble.of(predict(tiny.net(), state, data())[0])
    assert run.report.probe.ensemble_accuracy == total.accuracy(targets)
    assert run.report.probe.ensemble_loss == pytest.approx(total.loss(targets))


def test_nothing_of_the_models_stays_and_the_cost_is_said(run):
    assert not list(run.folder.glob("*/probe-*"))
    assert run.report.probe.spooled_bytes > 4 * 75 * 4
    assert 0 < run.report.probe.seconds < LONG


def test_as_many_models_are_kept_as_the_setting_says(tmp_path):
    run = Run(tmp_path, clients=5, probe_clients=2, probe_points=3)
    expected = sorted(sorted(run.sent, key=lambda node: draw(node, 1))[:2])
    assert list(run.report.probe.nodes) == expected
    assert len(run.report.probe.pairs) == 1
    assert len(run.report.probe.pairs[0].path.points) == 3


def late(reply):
    """The same answer, to a round that is over."""
    if "arrays" in reply.content:
        header = read_header(reply.content, pb.Reply())
        header.round = 9
        write_header(reply.content, header)
    return reply


def test_a_refused_client_is_not_among_them(tmp_path):
    run = Run(tmp_path, tamper={101: late})
    assert list(run.report.probe.nodes) == [100, 102, 103]
    assert run.report.probe.accepted == 3


def test_the_model_is_that_of_a_run_without_a_probe_set(tmp_path):
    probed, bare = Run(tmp_path / "a"), Run(tmp_path / "b", probe_set=False)
    assert probed.report.model_digest == bare.report.model_digest
    assert bare.report.probe is None


def test_a_loss_that_overflows_costs_the_numbers_and_not_the_run(tmp_path):
    data_ = [(torch.full((2, tiny.PIXELS), math.inf), torch.zeros(2, dtype=torch.int64))]
    run = Run(tmp_path, probe_set=ProbeSet(tiny.net(), data_))
    assert not run.report.probe.pairs
    assert run.report.probe.accepted == 4
    assert not list(tmp_path.glob("*/probe-*"))


def test_a_probe_set_of_another_model_is_refused_before_anything_is_sent(tmp_path):
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no tensor"):
        Run(tmp_path, probe_set=ProbeSet(other, data()))
    with pytest.raises(TypeError, match="pass a list or a DataLoader"):
        ProbeSet(tiny.net(), iter(data()))


def test_models_that_are_not_aligned_yet_are_not_compared(tmp_path):
    with pytest.raises(SettingsError, match=r"a probe set with align = 'server'.*set align = 'client'"):
        Run(tmp_path, align="server")


def test_a_client_of_a_failed_attempt_is_forgotten(tmp_path):
    spool = ModelSpool(tmp_path, {"steps": torch.tensor(3)}, 2, 1)
    for node in range(6):
        spool.keep(node, {"w": torch.full((3,), float(node))})
    lowest = sorted(sorted(range(6), key=lambda node: draw(node, 1))[:2])
    assert list(spool) == [str(node) for node in lowest]
    spool.retain([lowest[0]])
    assert list(spool) == [str(lowest[0])]
    state = spool[str(lowest[0])]
    assert state["w"].tolist() == [lowest[0]] * 3
    assert state["steps"] == 3
    spool.close()
    assert not list(tmp_path.iterdir())
