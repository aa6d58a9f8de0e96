"""A round is not lost: retries ask whoever is online, accepted replies are kept, and late ones are named or used."""

import pytest
import torch
from flwr.app import Error, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbasin.server.exchange.late_replies import staleness_weight
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.strategies.fusion.accumulator import Accumulator
from fedbasin.strategies.fusion.precisions import Diagonal, Gram
from fedbasin.strategies.fusion.update import Update
from tests import running, tiny
from tests.server.clock import Clock
from tests.server.fake_grid import FakeGrid


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Deadlines pass by waiting alone, however slow the machine is."""
    made = Clock(monkeypatch)
    yield made
    made.close()


class Restarts:
    """A grid whose nodes die when they are asked, and come back under another id with the data that they had."""

    def __init__(self, federation, deaths):
        self.federation = federation
        self.grid = FakeGrid(federation.contexts, self.answer)
        self._deaths = list(deaths)
        self.contexts = dict(federation.contexts)

    def answer(self, message):
        node = message.metadata.dst_node_id
        if node in self._deaths:
            self._deaths.remove(node)
            self.restart(node)
            return Message(Error(5, "Node Unavailable"), reply_to=message)
        return self.federation.answer(message)

    def restart(self, node):
        fresh = max(self.federation.contexts) + 100
        context = self.federation.contexts[node]
        context.state.clear()
        self.federation.contexts[fresh] = context
        self.grid.node_ids = [fresh if n == node else n for n in self.grid.node_ids]
        return fresh


def start(federation, folder, rounds=1, grid=None, **settings):
    arguments = {"align": "off", "fraction_evaluate": 0.0, "folder": str(folder)} | settings
    return running.run(federation, tiny.net(), rounds, grid=grid, **arguments)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return {
        recipe: start(tiny.federation(), tmp_path_factory.mktemp(recipe), 2, recipe=recipe).state_dict
        for recipe in ("fedavg", "regmean", "fisher")
    }


@pytest.mark.parametrize("recipe", ["fedavg", "regmean", "fisher"])
def test_a_node_that_comes_back_under_another_id_is_asked_and_nothing_is_trained_twice(tmp_path, undisturbed, recipe):
    app = tiny.make_app()
    restarts = Restarts(tiny.federation(app=app), [100])
    run = start(restarts.federation, tmp_path, 2, restarts.grid, quorum=1.0, recipe=recipe)
    assert same(run.state_dict, undisturbed[recipe])
    assert len(app.trained) == 2 * 3
    first = {client.node_id: client.outcome for client in run.reports[0].stages[0].clients}
    assert first == {100: "unavailable", 101: "accepted", 102: "accepted", 202: "accepted"}


def test_a_third_of_the_nodes_restarts_in_every_round_and_the_run_completes(tmp_path):
    federation = tiny.federation(6)
    expected = start(tiny.federation(6), tmp_path / "undisturbed", 4).state_dict
    restarts = Restarts(federation, [])
    asked = []

    def answer(message):
        # Every node with an even partition dies on the first request of its life, so two or three of six in a round.
        node, number = message.metadata.dst_node_id, message.content["config"]["server-round"]
        partition = federation.contexts[node].node_config["partition-id"]
        if (number, partition) not in asked and partition % 3 == number % 3:
            asked.append((number, partition))
            restarts._deaths.append(node)
        return Restarts.answer(restarts, message)

    restarts.grid.answer = answer
    run = start(federation, tmp_path / "restarts", 4, restarts.grid, quorum=1.0)
    assert len(asked) == 4 * 2
    assert same(run.state_dict, expected)


def test_a_node_that_is_gone_no_longer_counts_as_asked(tmp_path):
    federation = tiny.federation(min_available_nodes=2)
    grid = federation.grid()

    def answer(message):
        if message.metadata.dst_node_id == 100:
            grid.node_ids = [101, 102]
            return Message(Error(5, "Node Unavailable"), reply_to=message)
        return federation.answer(message)

    grid.answer = answer
    run = start(federation, tmp_path, grid=grid, quorum=1.0)
    assert len(run.reports[0].stages[0].accepted) == 2


def test_a_node_that_fails_is_replaced_by_one_that_was_not_sampled(tmp_path):
    app = tiny.make_app()
    federation = tiny.federation(6, app, fraction_train=0.5)
    sampled = start(tiny.federation(6, fraction_train=0.5), tmp_path / "first").reports[0].stages[0].accepted
    federation.contexts[sampled[0].node_id].run_config["fail"] = True
    run = start(federation, tmp_path / "second", quorum=1.0)
    outcomes = [client.outcome for client in run.reports[0].stages[0].clients]
    assert sorted(outcomes) == ["accepted"] * 3 + ["client_error"]


def test_a_stage_that_nobody_can_complete_still_ends_by_name(tmp_path):
    federation = tiny.federation()
    for context in federation.contexts.values():
        context.run_config["fail"] = True
    with pytest.raises(QuorumLostError, match=r"0 of 3 clients accepted, 2 needed, after 2 attempts"):
        start(federation, tmp_path)


class Slow:
    """A grid that holds one node's replies back: until the next round's request, or until a retry's."""

    def __init__(self, federation, node, *, within_round=False):
        self.federation, self._node, self._within_round = federation, node, within_round
        self.grid = FakeGrid(federation.contexts, self.answer)
        self.held = None

    def answer(self, message):
        reply = self.federation.answer(message)
        number = message.content["config"]["server-round"]
        if self.held and (self._within_round or self.held[0] < number):
            self.grid._inbox[self.held[1]] = (0.0, self.held[2])
            self.held = None
        if message.metadata.dst_node_id != self._node:
            return reply
        if self.held is None:
            self.held = number, message.metadata.message_id, reply
        return None


def test_a_late_reply_is_named_and_left_out(tmp_path):
    slow = Slow(tiny.federation(), 102)
    run = start(slow.federation, tmp_path, 2, slow.grid, round_timeout_seconds=0.5)
    first, second = ([(c.node_id, c.outcome) for c in report.stages[0].clients] for report in run.reports)
    assert (102, "timeout") in first
    assert (102, "late") in second or dict(second)[102] == "timeout"
    details = [c.detail for c in run.reports[1].stages[0].clients if c.outcome == "late"]
    assert details in ([], ["it answers round 1"])


def test_a_late_reply_is_used_by_its_age_in_place_of_another_training(tmp_path):
    app = tiny.make_app()
    slow = Slow(tiny.federation(app=app), 102)
    run = start(slow.federation, tmp_path, 2, slow.grid, round_timeout_seconds=0.5, late_rounds=1)
    second = {client.node_id: client for client in run.reports[1].stages[0].clients}
    assert second[102].outcome == "accepted"
    assert second[102].examples == pytest.approx(22 * staleness_weight(1))
    assert "1 round late" in second[102].detail
    assert [number for node, number in app.trained if node == 102] == [1]


def test_a_retry_still_takes_the_first_attempts_reply(tmp_path, undisturbed):
    slow = Slow(tiny.federation(), 102, within_round=True)
    run = start(slow.federation, tmp_path, 1, slow.grid, round_timeout_seconds=0.5, quorum=1.0, attempts=2)
    assert [c.outcome for c in run.reports[0].stages[0].clients] == ["accepted"] * 3


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 4.0), st.integers(0, 99))
def test_a_scaled_update_weighs_as_the_same_client_with_other_numbers(factor, seed):
    draw = torch.Generator().manual_seed(seed)
    anchor = {"w": torch.zeros(3, 4), "b": torch.zeros(3)}

    def update(examples, weigh):
        inputs = torch.randn(9, 4, generator=draw)
        parameters = {name: torch.randn(t.shape, generator=draw) for name, t in anchor.items()}
        precisions = {("w",): Gram(weigh * inputs.T @ inputs), ("b",): Diagonal(weigh * torch.ones(3))}
        return Update(parameters, examples, precisions)

    first, second = update(5.0, 1.0), update(7.0, 1.0)
    by_hand = Update(
        second.parameters, factor * 7.0, {block: p.scaled(factor) for block, p in second.precisions.items()}
    )
    sums = []
    for other in (second.scaled(factor), by_hand):
        accumulator = Accumulator.zero(anchor, torch.float64)
        accumulator.add(first)
        accumulator.add(other)
        sums.append(accumulator.finalize(anchor, None))
    assert same(*sums)
    assert [staleness_weight(age) for age in (0, 3)] == [1.0, 0.5]
