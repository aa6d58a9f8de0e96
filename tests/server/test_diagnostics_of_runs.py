"""What a run says of its clients' directions, of hidden variances, and of what probing took."""

import math
from itertools import pairwise

import pytest

from fedbasin.proto.request import Request
from fedbasin.strategies.capture.preactivations import preactivation_moments
from fedbasin.strategies.diagnostics.geometry import cosine
from fedbasin.strategies.diagnostics.singular_vectors import spectral_alignment
from fedbasin.strategies.diagnostics.variance_ratios import variance_ratios
from fedbasin.strategies.tensors.state import distance, floating
from tests import running, tiny
from tests.federation import Federation
from tests.waiting import LONG


class Run:
    """A run of three clients that keeps what each sent, and the anchor of every round."""

    def __init__(self, folder, rounds=2, clients=3, **config):
        self.federation = tiny.federation(clients, folder=str(folder), **config)
        self.nodes = list(self.federation.contexts)
        self.sent, self.anchors = {}, {}
        self.federation.answer = self.answer
        self.federation.tamper = {node: self.keep(node) for node in self.nodes}
        result = running.run(self.federation, tiny.net(), rounds, symmetry=tiny.symmetry())
        self.reports, self.model = result.reports, result.state_dict
        self.trained = result.trained_arrays.to_torch_state_dict()

    def answer(self, message):
        self.request = Request.from_message(message.content)
        key = self.request.round, self.request.stage
        self.anchors.setdefault(key, self.request.anchor)
        return Federation.answer(self.federation, message)

    def keep(self, node):
        def seen(reply):
            assert not reply.has_error(), reply.error.reason
            if self.request.stage == "fuse":
                state = reply.content["arrays"].to_torch_state_dict()
                self.sent[self.request.round, node] = state
            return reply

        return seen

    def clients(self, number, stage="fuse"):
        (report,) = [r for r in self.reports[number - 1].stages if r.stage == stage]
        return {client.node_id: client for client in report.clients}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return Run(folder, start="own", barrier_points=3, fused_points=3)


def test_every_update_has_its_norm_and_its_angle_to_the_round_before(run):
    anchor, before = run.anchors[2, "fuse"], run.anchors[1, "fuse"]
    moved = {name: 2 * anchor[name] - before[name] for name in floating(anchor)}  # as far again
    for node, client in run.clients(2).items():
        own = run.sent[2, node]
        assert client.update_norm == pytest.approx(distance(anchor, own), rel=1e-6)
        assert client.update_cosine == pytest.approx(cosine(anchor, own, moved), abs=1e-6)
    assert not any(client.update_cosine is not None for client in run.clients(1).values())
    assert not any(client.update_norm is not None for client in run.clients(1, "bootstrap").values())


def test_the_round_says_how_the_updates_lie_to_one_another(run):
    cosines, anchor = run.reports[1].update_cosines, run.anchors[2, "fuse"]
    own = [run.sent[2, node] for node in run.nodes]
    fused = [cosine(anchor, state, run.model) for state in own]
    pairs = [cosine(anchor, own[i], own[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert (cosines.clients, cosines.entries, cosines.total_entries) == (3, 75, 75)
    assert cosines.fused == pytest.approx(sum(fused) / 3, abs=1e-6)
    assert cosines.clients_mean == pytest.approx(sum(pairs) / 3, abs=1e-6)
    said = [client.update_cosine for client in run.clients(2).values()]
    assert cosines.previous == pytest.approx(sum(said) / 3)
    assert cosines.seconds > 0
    assert run.reports[0].update_cosines.previous is None


@pytest.mark.parametrize("recipe", ["features", "auto-features", "fedavgm"])
def test_what_a_round_moved_by_is_told_by_the_models_that_are_broadcast(tmp_path, recipe):
    run = Run(tmp_path, rounds=3, recipe=recipe)
    models = [*(run.anchors[number, "fuse"] for number in (1, 2, 3)), run.trained]
    for number, (anchor, new) in enumerate(pairwise(models), start=1):
        lie = [cosine(anchor, run.sent[number, node], new) for node in run.nodes]
        assert run.reports[number - 1].update_cosines.fused == pytest.approx(sum(lie) / 3, abs=1e-6)
    for number, before, anchor in ((2, *models[:2]), (3, *models[1:3])):
        again = {name: 2 * anchor[name] - before[name] for name in floating(anchor)}
        for node, client in run.clients(number).items():
            said = cosine(anchor, run.sent[number, node], again)
            assert client.update_cosine == pytest.approx(said, abs=1e-6)


def test_the_directions_of_the_layers_are_compared_with_the_anchor(run):
    anchor = run.anchors[1, "fuse"]
    for node, client in run.clients(1).items():
        agreement = client.alignment.singular_vectors
        assert (agreement.measured, agreement.matrices) == (2, 2)
        assert agreement.after == pytest.approx(spectral_alignment(anchor, run.sent[1, node]).total, abs=1e-6)
        assert agreement.before <= agreement.after


def test_hidden_variances_are_those_of_the_two_models_on_the_clients_data(run):
    ratios = {}
    for node in run.nodes:
        data = tiny.batches(run.federation.contexts[node])
        own = {**run.model, **run.sent[2, node]}
        fused, theirs = (preactivation_moments(tiny.net(), s, data) for s in (run.model, own))
        for layer, ratio in variance_ratios(fused, [theirs]).items():
            ratios.setdefault(layer, []).append(ratio.layer)
    found = {entry.layer: entry.ratio for entry in run.reports[1].variance}
    assert found == pytest.approx({layer: sum(of) / 3 for layer, of in ratios.items()}, rel=1e-5)
    assert all(0 < ratio < math.inf for ratio in found.values())


def test_probing_says_what_it_took(run):
    for stage in ("fuse", "evaluate"):
        for client in run.clients(2, stage).values():
            assert 0 < client.probe_seconds < LONG
            assert client.probe_bytes > 3 * 8 * 2  # three points, loss and correct


def test_unasked_nothing_is_probed(tmp_path):
    run = Run(tmp_path, rounds=1)
    assert not run.reports[0].variance
    assert all(client.probe_bytes < 50 for client in run.clients(1).values())
    assert not any(client.probe_bytes for client in run.clients(1, "evaluate").values())
    assert run.reports[0].update_cosines.clients == 3


@pytest.mark.parametrize(("share", "probing"), [(0.1, 1), (0.4, 2), (1.0, 5)])
def test_a_share_of_the_clients_probes_and_the_others_change_no_sum(tmp_path, share, probing):
    settings = {"probe_share": share, "barrier_points": 3, "fused_points": 3}
    run = Run(tmp_path, rounds=1, clients=5, **settings)
    (report,) = run.reports
    assert report.path.clients == report.fused_path.clients == probing
    for stage in ("fuse", "evaluate"):
        clients = run.clients(1, stage).values()
        assert all(client.outcome == "accepted" for client in clients)
        assert sum(client.probe_bytes > 50 for client in clients) == probing
    assert not any(len(context.state) for context in run.federation.contexts.values())
    assert all(client.update_norm > 0 for client in run.clients(1).values())


def test_who_probes_changes_nothing_in_the_model(tmp_path):
    some = Run(tmp_path / "a", rounds=1, probe_share=0.3, barrier_points=3, fused_points=3)
    none = Run(tmp_path / "b", rounds=1)
    assert some.reports[0].model_digest == none.reports[0].model_digest


def test_where_the_server_aligns_directions_are_left_out(tmp_path):
    run = Run(tmp_path, rounds=1, align="server")
    assert run.reports[0].update_cosines is None
    assert not any(client.update_norm is not None for client in run.clients(1).values())
