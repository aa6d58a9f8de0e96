"""Recipes of several stages over a federation in this process, held to what the clients' own models give directly."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from operator import itemgetter
from typing import ClassVar

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message
from safetensors.torch import load_file
from torch.nn.functional import linear, one_hot, pad, relu

from fedbasin.proto.reply import Reply
from fedbasin.proto.request import Request
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.run.composition import Composition
from fedbasin.server.run.settings import Settings, SettingsError
from fedbasin.strategies.fusion.accumulator import Ridge
from fedbasin.strategies.fusion.head import Evidence, closed_form
from fedbasin.strategies.fusion.head_memory import HeadMemory, HeadSums
from fedbasin.strategies.fusion.precisions import Gram
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round import choice as choice_module
from fedbasin.strategies.round import fit_plan
from fedbasin.strategies.round import search as search_module
from fedbasin.strategies.tensors.state import floating
from tests import running, tiny
from tests.server.fake_grid import FakeGrid
from tests.server.flowers_loop import arrays_of, fed_basin, grid_of

NODES = [100, 101, 102]
FIRST, HEAD = ("0.weight", "0.bias"), ("3.weight", "3.bias")
STAGES = {
    "fedavg": ["fuse"],
    "fedavgm": ["fuse"],
    "fisher": ["fuse"],
    "kfac": ["fuse", "probe", "probe"],
    "regmean": ["fuse", "probe", "probe"],
    "regmean++": ["fuse", "fit", "fit", "probe"],
    "features": ["fuse", "fit", "fit", "probe"],
    "head": ["fuse", "head", "probe"],
    "auto-features": ["fuse", "fit", "head", "probe", "probe", "trial", "scale"],
    "auto": ["fuse", "head", "probe", "probe", "trial", "scale"],
    "features-head": ["fuse", "fit", "head", "probe"],
}
FITTED = [name for name in tiny.OF_ANY_MODEL if RECIPES[name].refit]
W = torch.float64


@pytest.fixture(autouse=True)
def a_few_examples_decide(monkeypatch):
    """Let every difference count, and averaging be slow: a run of a round or two then has all stages."""
    monkeypatch.setattr(choice_module, "_DEVIATIONS", 0.0)
    monkeypatch.setattr(search_module, "is_slow", lambda *_: True)


class Run:
    """A run that remembers what every client sent, and may do something to a reply on its way."""

    def __init__(self, folder, rounds=1, on_reply: Callable | None = None, grid=None, **config):
        settings = {"align": "off", "fraction_evaluate": 0.0, "folder": str(folder)} | config
        self.app = tiny.make_app()
        self.federation = tiny.federation(app=self.app, **settings)
        self.on_reply = on_reply or (lambda run, node, stage, reply: reply)
        self.sent = {}
        self.federation.tamper = {node: partial(self.seen, node) for node in NODES}
        symmetry = None if settings["align"] == "off" else tiny.symmetry()
        grid = FakeGrid(NODES, self.asked, **(grid or {}))
        self.result = running.run(self.federation, tiny.net(), rounds, grid=grid, symmetry=symmetry)
        self.model = self.result.state_dict

    def seen(self, node, reply):
        if not reply.has_error() and self.request.stage == "fuse":
            parameters = Reply.from_message(reply.content, self.request).parameters
            self.sent[node] = {n: tensor.to(W) for n, tensor in floating(parameters).items()}
        return self.on_reply(self, node, self.request.stage, reply)

    def asked(self, message):
        self.request = Request.from_message(message.content)
        return self.federation.answer(message)

    def stages(self, number=1):
        return self.result.reports[number - 1].stages

    def outcomes(self, index, number=1):
        return {c.node_id: c.outcome for c in self.stages(number)[index].clients}

    def data(self, node):
        inputs, targets = tiny.examples(self.federation.contexts[node])
        return inputs.to(W), targets


def failing(failed):
    """Let every client fail at a stage."""

    def on_reply(run, _node, stage, reply):
        asked = run.federation.asked[-1]
        return Message(Error(2, "MemoryError"), reply_to=asked) if stage == failed else reply

    return on_reply


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b, names=None):
    for name in names or b:
        torch.testing.assert_close(a[name].to(W), b[name].to(W), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", tiny.OF_ANY_MODEL)
def test_every_recipe_runs_its_stages_in_order_in_every_round(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(choice_module, "pays", lambda _: True)
    run = Run(tmp_path, 2, recipe=recipe, fraction_evaluate=1.0)
    for report in run.result.reports:
        assert [stage.stage for stage in report.stages] == [*STAGES[recipe], "evaluate"]
        for stage in report.stages:
            assert [client.outcome for client in stage.clients] == ["accepted"] * 3
        assert report.metrics["accuracy"] > 0.4
    assert all(tensor.isfinite().all() for tensor in run.model.values())
    assert len(run.app.trained) == 6


def norm(state):
    """What batch normalisation does in evaluation, as a scale and a shift."""
    scale = state["1.weight"] / (state["1.running_var"] + 1e-5).sqrt()
    return scale, state["1.bias"] - state["1.running_mean"] * scale


def hidden(state, x):
    scale, shift = norm(state)
    return linear(x, state["0.weight"], state["0.bias"]) * scale + shift


def sums(rows, targets):
    """Over all clients' rows."""
    x, z = pad(torch.cat(rows), (0, 1), value=1.0), torch.cat(targets)
    return x.T @ x, z.T @ x


def ridge(rows, targets, base, strength):
    """Ridge regression of all clients' rows on their targets, drawn to `base`."""
    gram, moment = sums(rows, targets)
    rho = strength * gram.diagonal().mean()
    return torch.linalg.solve(gram + rho * torch.eye(len(gram), dtype=W), (moment + rho * base).T).T


def fitted(state, block, solution):
    return {**state, block[0]: solution[:, :-1], block[1]: solution[:, -1]}


def weight_and_bias(state, block):
    return torch.cat([state[block[0]], state[block[1]][:, None]], 1)


def mean(run):
    counts = {node: float(len(run.data(node)[1])) for node in NODES}
    total = sum(counts.values())

    def over_clients(of):
        return sum(counts[node] * of(run.sent[node]) for node in NODES) / total

    state = {name: over_clients(itemgetter(name)) for name in run.sent[NODES[0]]}
    moments = over_clients(lambda own: own["1.running_var"] + own["1.running_mean"] ** 2)
    return {**state, "1.running_var": moments - state["1.running_mean"] ** 2}


def restated(state, xs):
    """With the running statistics that the model has on all clients' data at once, and the same function."""
    read = linear(torch.cat(xs), state["0.weight"], state["0.bias"])
    scale, shift = norm(state)
    mean, variance = read.mean(0), read.var(0, unbiased=False)
    statistics = {"1.running_mean": mean, "1.running_var": variance}
    learned = {"1.weight": scale * (variance + 1e-5).sqrt(), "1.bias": shift + scale * mean}
    return {**state, **statistics, **learned}


def directly(run, recipe, strength):
    """Feature regression in float64 on all clients' data at once, layer by layer."""
    state, xs = mean(run), [run.data(node)[0] for node in NODES]
    owns = [run.sent[node] for node in NODES]
    scale, shift = norm(state)
    if recipe == "features":
        goals = [(hidden(own, x) - shift) / scale for own, x in zip(owns, xs, strict=True)]
    else:
        goals = [linear(x, own["0.weight"], own["0.bias"]) for own, x in zip(owns, xs, strict=True)]
    state = fitted(state, FIRST, ridge(xs, goals, weight_and_bias(state, FIRST), strength))
    rows = [relu(hidden(state, x)) for x in xs]
    read = [relu(hidden(own, x)) for own, x in zip(owns, xs, strict=True)]
    if recipe != "features":
        read = rows
    goals = [linear(x, own["3.weight"], own["3.bias"]) for own, x in zip(owns, read, strict=True)]
    whole = fitted(state, HEAD, ridge(rows, goals, weight_and_bias(state, HEAD), strength))
    return restated(whole, xs)


@pytest.mark.parametrize("recipe", ["features", "regmean++"])
def test_a_round_is_the_regression_on_all_clients_data_at_once(tmp_path, recipe):
    run = Run(tmp_path, recipe=recipe, ridge=0.03)
    close(run.model, directly(run, recipe, 0.03))


@pytest.mark.parametrize("config", [{}, {"ridge": 0.2}])
def test_the_recipe_head_is_the_discriminants_of_all_clients_fused_features(tmp_path, config):
    run = Run(tmp_path, recipe="head", **config)
    state = mean(run)
    rows = [relu(hidden(state, run.data(node)[0])) for node in NODES]
    goals = [one_hot(run.data(node)[1], tiny.CLASSES).to(W) for node in NODES]
    gram, moment = sums(rows, goals)
    asked = Ridge(config["ridge"]) if config else Evidence()
    expected = fitted(state, HEAD, closed_form(HEAD, Gram(gram), moment, asked))
    close(run.model, restated(expected, [run.data(node)[0] for node in NODES]))


def test_half_of_the_way_is_taken_before_the_head_is_fitted(tmp_path):
    run = Run(tmp_path, recipe="features-head", ridge=0.1)
    state, whole = mean(run), directly(run, "features", 0.1)
    for name in FIRST:
        expected = (state[name] + whole[name]) / 2
        close(run.model, {name: expected})


def lose(at, who):
    """A client whose SuperNode restarts after it has answered a stage."""

    def on_reply(run, node, stage, reply):
        if (stage, node) == (at, who):
            run.federation.contexts[node].state.clear()
        return reply

    return on_reply


@pytest.mark.parametrize("recipe", FITTED)
def test_a_client_that_lost_its_models_is_refused_by_name_and_the_stages_go_on(tmp_path, recipe):
    run = Run(tmp_path, recipe=recipe, on_reply=lose("fuse", 101))
    assert run.outcomes(1) == {100: "accepted", 101: "lost_model", 102: "accepted"}
    (client,) = [c for c in run.stages()[1].clients if c.node_id == 101]
    assert "round 1" in client.detail
    for index in range(2, len(run.stages())):
        assert run.outcomes(index) == {100: "accepted", 102: "accepted"}


def test_a_client_that_loses_its_models_between_two_fits_is_in_the_first_alone(tmp_path):
    run = Run(tmp_path, recipe="features", on_reply=lose("fit", 101))
    assert run.outcomes(1) == dict.fromkeys(NODES, "accepted")
    assert run.outcomes(2) == {100: "accepted", 101: "lost_model", 102: "accepted"}


def test_a_client_that_is_back_takes_part_in_the_next_round(tmp_path, monkeypatch):
    monkeypatch.setattr(choice_module, "pays", lambda _: True)
    first = []

    def once(run, node, stage, reply):
        if not first and (stage, node) == ("fuse", 101):
            first.append(node)
            run.federation.contexts[node].state.clear()
        return reply

    run = Run(tmp_path, 2, recipe="features", on_reply=once)
    assert run.outcomes(1)[101] == "lost_model"
    assert run.outcomes(2, 2) == dict.fromkeys(NODES, "accepted")


@pytest.mark.parametrize("recipe", FITTED)
def test_replies_that_come_twice_change_nothing(tmp_path, recipe):
    plain = Run(tmp_path / "plain", recipe=recipe)
    twice = Run(tmp_path / "twice", recipe=recipe, grid={"duplicates": True})
    assert equal(plain.model, twice.model)


def failing_at(index):
    """The replies of two of three clients to this stage are lost, the first time."""
    lost = set()

    def on_reply(run, node, stage, reply):
        refit = run.request.refit
        if node == 102 or node in lost or index != (refit.sequence + 1 if refit else 0):
            return reply
        lost.add(node)
        return Message(Error(5, "gone"), reply_to=run.federation.asked[-1])

    return on_reply


@pytest.mark.parametrize(
    ("recipe", "index"), [(recipe, index) for recipe in FITTED for index in range(len(STAGES[recipe]))]
)
def test_a_stage_that_is_asked_anew_gives_the_same(tmp_path, recipe, index):
    """Also the last one, for which clients need the models that they kept."""
    plain = Run(tmp_path / "plain", recipe=recipe)
    again = Run(tmp_path / "again", on_reply=failing_at(index), recipe=recipe, attempts=2)
    assert again.outcomes(index) == dict.fromkeys(NODES, "accepted")
    assert equal(again.model, plain.model)
    assert len(again.app.trained) == 3


def test_a_fit_that_too_few_answer_names_its_stage(tmp_path):
    def forgetful(run, node, stage, reply):
        run.federation.contexts[node].state.clear()
        return reply

    with pytest.raises(QuorumLostError, match=r"stage fit: 0 of 3.*nodes 100, 101, 102: lost_model"):
        Run(tmp_path, recipe="features", on_reply=forgetful)


def test_later_stages_bring_only_the_layers_that_are_new(tmp_path):
    run = Run(tmp_path, recipe="features-head")
    fuse, fit, head, _ = ({c.bytes_down for c in stage.clients} for stage in run.stages())
    sizes = {name: tensor.nbytes for name, tensor in run.model.items()}
    assert fuse == fit
    assert min(fuse) >= sum(sizes.values())
    new = sum(sizes[name] for name in FIRST)
    # Every array has a header of 128 bytes.
    assert head <= set(range(new, new + 400))


def test_clients_keep_nothing_once_the_round_has_been_evaluated(tmp_path):
    run = Run(tmp_path, recipe="features", fraction_evaluate=1.0)
    for context in run.federation.contexts.values():
        assert not [name for name in context.state if name.startswith("fedbasin")]


@pytest.mark.parametrize("recipe", ["features", "auto-features"])
def test_the_path_from_the_fused_model_is_walked_after_fits_too(tmp_path, recipe):
    run = Run(tmp_path, recipe=recipe, fused_points=3, fraction_evaluate=1.0)
    (report,) = run.result.reports
    assert report.fused_path.clients == 3
    assert report.fused_path.points == (0, 0.5, 1)


@pytest.mark.parametrize("optimizer", ["replace", "average", "momentum", "adam", "yogi"])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path, optimizer):
    config = {"recipe": "features", "server_optimizer": optimizer}
    whole = Run(tmp_path / "whole", 4, **config)
    cut = Run(tmp_path / "cut", 2, **config)
    resumed = Run(tmp_path, 4, resume=str(cut.result.folder), **config)
    assert equal(resumed.model, whole.model)
    assert {number for _, number in resumed.app.trained} == {3, 4}


class TestRemembering:
    """A round that asks some of the clients has the sums of the others from earlier rounds."""

    PART: ClassVar = {"fraction_train": 0.4, "min_available_nodes": 3, "min_train_nodes": 2}

    @pytest.mark.parametrize("recipe", ["head", pytest.param("auto", marks=pytest.mark.slow)])
    def test_a_run_that_was_cut_off_goes_on_bit_for_bit(self, tmp_path, recipe):
        whole = Run(tmp_path / "whole", 3, recipe=recipe, **self.PART)
        cut = Run(tmp_path / "cut", 2, recipe=recipe, **self.PART)
        resumed = Run(tmp_path, 3, recipe=recipe, resume=str(cut.result.folder), **self.PART)
        assert equal(resumed.model, whole.model)
        forgetful = Run(tmp_path / "forgetful", 3, recipe=recipe, remembered_bytes=0, **self.PART)
        assert not equal(forgetful.model, whole.model)

    def test_where_all_are_asked_nothing_is_remembered_and_nothing_differs(self, tmp_path):
        whole, forgetful = Run(tmp_path, 2, recipe="head"), Run(tmp_path, 2, recipe="head", remembered_bytes=0)
        assert equal(whole.model, forgetful.model)
        sizes = [sorted(f.stat().st_size for f in run.result.folder.glob("optimizer-*")) for run in (whole, forgetful)]
        assert sizes[0] == sizes[1]

    def test_what_a_client_sent_before_it_was_refused_is_forgotten(self):
        strategy = fed_basin(fraction_train=0.4)
        state = strategy.run
        for node in (100, 101, 102):
            state.memory.add(1, node, HeadSums(torch.eye(3), torch.ones(2, 3)))
        state.strikes.strikes[101] = {1}
        list(strategy.configure_train(2, arrays_of(tiny.net()), ConfigRecord(), grid_of(tiny.federation(3))))
        assert set(state.memory.clients) == {100, 102}

    def test_a_robust_rule_knows_only_its_round(self):
        settings, memory = Settings(recipe="head", robust="krum", hostile_clients=1, min_train_nodes=9), HeadMemory(1)
        robust, plain = settings.composed, settings.composed.averaging
        stages = Composition(settings, robust, "off").round_stages
        assert stages(2, robust, memory).memory is None
        assert stages(2, replace(plain, robust=None), memory).memory is memory


class TestChoosing:
    """Two models of a round: the one that is served, and the one that the next round trains on."""

    @staticmethod
    def trials(monkeypatch, *, pay):
        """Let every trial end as a test wants it, and every closed form pay or none."""
        monkeypatch.setattr(search_module, "is_trainable", lambda trial, gain: pay)
        monkeypatch.setattr(search_module, "best_candidate", lambda average, models, _: models[-1] if pay else average)
        monkeypatch.setattr(search_module, "best_scaled", lambda *_: None)

    def test_fitting_goes_on_while_it_pays(self, tmp_path, monkeypatch):
        self.trials(monkeypatch, pay=True)
        run = Run(tmp_path, 3, recipe="auto")
        assert {len(report.stages) for report in run.result.reports} == {6}
        assert run.result.reports[0].choice.trained_on == "fitted"

    @pytest.mark.parametrize("recipe", ["auto-features", "auto"])
    def test_a_trial_that_nobody_can_take_leaves_the_mean_and_the_served_model(self, tmp_path, recipe):
        def failing(run, _node, stage, reply):
            asked = run.federation.asked[-1]
            return Message(Error(2, "ValueError: no such optimizer"), reply_to=asked) if stage == "trial" else reply

        run = Run(tmp_path, 2, failing, recipe=recipe)
        whole = Run(tmp_path / "whole", recipe=recipe)
        (first, _) = run.result.reports
        assert {c.outcome for c in first.stages[-2].clients} == {"client_error"}
        assert (first.choice.served, first.choice.trained_on) == ("fitted", "average")
        assert first.choice.loss == whole.result.reports[0].choice.loss

    @pytest.mark.parametrize(("stage", "stages"), [("head", [2, 1, 2]), ("probe", [3, 1, 3])])
    def test_a_stage_that_nobody_can_take_leaves_the_mean_and_pauses(self, tmp_path, stage, stages):
        run = Run(tmp_path, 3, failing(stage), recipe="auto")
        assert [len(report.stages) for report in run.result.reports] == stages
        assert all(report.choice is None for report in run.result.reports)
        assert equal(run.model, Run(tmp_path / "mean", 3, recipe="fedavg").model)

    def test_after_own_starts_one_clients_model_with_a_head_is_a_candidate(self, tmp_path, monkeypatch):
        def clients(_, models, _examples):
            return next(model for model in models if model.origin.name == "client" and model.point == 1.0)

        monkeypatch.setattr(search_module, "best_candidate", clients)
        run = Run(tmp_path, 1, failing("steps"), recipe="auto", start="own", align="client")
        stages = [stage.stage for stage in run.stages()]
        fits = ["head", "probe", "fit", "head", "probe", "probe", "trial"]
        assert stages == ["bootstrap", "fuse", "measure", *fits, "steps"]
        assert run.result.reports[0].choice.served == "client"
        # The anchor is the first client's model, which it has sent as its own.
        torch.testing.assert_close(run.model["0.weight"].to(W), run.sent[100]["0.weight"])
        assert not torch.equal(run.model["3.weight"].to(W), run.sent[100]["3.weight"])

    def test_rounds_of_averaging_follow_where_it_does_not_and_double(self, tmp_path, monkeypatch, caplog):
        self.trials(monkeypatch, pay=False)
        with caplog.at_level("INFO", "flwr.fedbasin"):
            run = Run(tmp_path, 8, recipe="auto")
        stages = [len(report.stages) for report in run.result.reports]
        assert stages == [5, 1, 5, 1, 1, 5, 1, 1]
        assert "averages for 2 rounds" in caplog.text
        assert run.result.trained_arrays is run.result.arrays
        # What is trained on has been the mean of every round, as in plain averaging.
        assert equal(run.model, Run(tmp_path / "mean", 8, recipe="fedavg").model)

    def test_the_mean_is_trained_on_while_a_head_is_served(self, tmp_path, monkeypatch):
        monkeypatch.setattr(search_module, "is_trainable", lambda trial, gain: False)
        run = Run(tmp_path, recipe="auto")
        averaged = Run(tmp_path / "mean", recipe="fedavg").model
        trained = {name: array.numpy() for name, array in run.result.trained_arrays.items()}
        assert all((averaged[name].numpy() == trained[name]).all() for name in averaged)
        assert run.result.reports[0].choice.served == "fitted"
        assert not torch.equal(run.model["3.weight"], averaged["3.weight"])
        (report,) = run.result.reports
        assert report.choice.loss < report.choice.average_loss
        assert report.choice.accuracy >= report.choice.average_accuracy
        assert load_file(run.result.folder / "global.safetensors")["3.weight"].equal(run.model["3.weight"])

    @pytest.mark.parametrize(
        ("recipe", "pay"),
        [
            ("auto", True),
            ("auto-features", False),
            *(pytest.param(*case, marks=pytest.mark.slow) for case in (("auto", False), ("auto-features", True))),
        ],
    )
    def test_a_run_that_was_cut_off_goes_on_bit_for_bit(self, tmp_path, monkeypatch, recipe, pay):
        monkeypatch.setattr(search_module, "is_trainable", lambda trial, gain: pay)
        whole = Run(tmp_path / "whole", 4, recipe=recipe)
        cut = Run(tmp_path / "cut", 2, recipe=recipe)
        resumed = Run(tmp_path, 4, recipe=recipe, resume=str(cut.result.folder))
        assert equal(resumed.model, whole.model)
        assert [r.choice for r in resumed.result.reports] == [r.choice for r in whole.result.reports]
        same = zip(resumed.result.trained_arrays.values(), whole.result.trained_arrays.values(), strict=True)
        assert all(a.data == b.data for a, b in same)

    def test_a_model_that_closed_forms_have_made_is_served_while_later_rounds_rest(self, tmp_path, monkeypatch):
        monkeypatch.setattr(search_module, "is_trainable", lambda trial, gain: False)
        monkeypatch.setattr(choice_module, "_FIRST_ROUNDS", 2)
        # As if every round had sampled other clients.
        numbers = count()
        monkeypatch.setattr(choice_module, "judges", lambda _: frozenset({next(numbers)}))
        whole = Run(tmp_path / "whole", 5, recipe="auto")
        assert [len(report.stages) for report in whole.result.reports] == [6, 6, 1, 1, 1]
        rounds = [report.choice.served_round for report in whole.result.reports]
        assert rounds[1] <= 2
        assert set(rounds[1:]) == {rounds[1]}
        cut = Run(tmp_path / "cut", 3, recipe="auto")
        resumed = Run(tmp_path, 5, recipe="auto", resume=str(cut.result.folder))
        assert equal(resumed.model, whole.model)
        assert [r.choice for r in resumed.result.reports] == [r.choice for r in whole.result.reports]
        trained = {name: array.numpy() for name, array in resumed.result.trained_arrays.items()}
        averaged = Run(tmp_path / "mean", 5, recipe="fedavg").model
        assert all((averaged[name].numpy() == trained[name]).all() for name in averaged)

    def test_pauses_survive_a_resume(self, tmp_path, monkeypatch):
        self.trials(monkeypatch, pay=False)
        cut = Run(tmp_path / "cut", 4, recipe="auto")
        resumed = Run(tmp_path, 6, recipe="auto", resume=str(cut.result.folder))
        assert [len(report.stages) for report in resumed.result.reports] == [5, 1, 5, 1, 1, 5]


def test_a_server_optimizer_of_the_settings_is_not_the_recipes_own(tmp_path):
    own, momentum = (Run(tmp_path / name, 3, recipe="features", server_optimizer=name) for name in ("", "momentum"))
    assert not torch.equal(own.model["0.weight"], momentum.model["0.weight"])


def test_fitting_blocks_asks_fewer_stages(tmp_path):
    run = Run(tmp_path, recipe="features", fit="block")
    # The layers 0 and 3 of this stack are blocks of their own.
    assert [stage.stage for stage in run.stages()] == ["fuse", "fit", "fit", "probe"]


@pytest.mark.parametrize("recipe", [name for name in FITTED if not RECIPES[name].chooses])
def test_a_server_that_aligns_cannot_fit(tmp_path, recipe):
    with pytest.raises(SettingsError, match=r"align = 'server': recipe.*set align = 'client'"):
        Run(tmp_path, recipe=recipe, align="server")


@pytest.mark.parametrize("recipe", FITTED)
def test_no_recipe_needs_an_app_that_evaluates(tmp_path, recipe):
    run = Run(tmp_path, recipe=recipe)
    asked = {message.metadata.message_type for message in run.federation.asked}
    assert asked == {"train"}


APART = [name for name, recipe in RECIPES.items() if recipe.serves_apart]


class TestServingApart:
    """Closed forms that are served, while clients train on from the mean as under plain averaging."""

    @staticmethod
    def trained(run):
        return {name: torch.from_numpy(array.numpy()) for name, array in run.result.trained_arrays.items()}

    @pytest.mark.parametrize("robust", ["", "median"])
    @pytest.mark.parametrize("recipe", [name for name in APART if RECIPES[name].refit and RECIPES[name].refit.head])
    def test_clients_train_on_from_what_averaging_gives_where_a_head_is_fitted(self, tmp_path, recipe, robust):
        run = Run(tmp_path, 3, recipe=recipe, robust=robust, min_train_nodes=3)
        averaged = Run(tmp_path / "mean", 3, recipe="fedavg", robust=robust, min_train_nodes=3).model
        assert equal(self.trained(run), averaged)

    @pytest.mark.parametrize(
        "recipe", [name for name in APART if not (RECIPES[name].refit and RECIPES[name].refit.head)]
    )
    def test_elsewhere_the_closed_form_of_the_first_round_alone_is_trained_on(self, tmp_path, recipe):
        first = Run(tmp_path / "first", recipe=recipe)
        assert equal(self.trained(first), first.model)
        assert not torch.allclose(first.model["3.weight"].to(W), mean(first)["3.weight"])
        run = Run(tmp_path, 3, recipe=recipe)
        close(self.trained(run), mean(run))

    @pytest.mark.parametrize("recipe", APART)
    def test_the_served_model_is_never_worse_than_the_mean_on_the_examples_that_compare_them(self, tmp_path, recipe):
        choices = [report.choice for report in Run(tmp_path, 3, recipe=recipe).result.reports]
        for choice in filter(None, choices):
            assert choice.loss <= choice.average_loss
            assert choice.accuracy >= choice.average_accuracy
            assert choice.served != "average" or choice.loss == choice.average_loss

    @pytest.mark.parametrize("recipe", APART)
    def test_where_nobody_can_compare_the_closed_form_is_served(self, tmp_path, recipe):
        def failing(run, _node, stage, reply):
            asked = run.federation.asked[-1]
            return Message(Error(2, "MemoryError"), reply_to=asked) if stage == "probe" else reply

        run = Run(tmp_path, recipe=recipe, on_reply=failing)
        averaged = Run(tmp_path / "mean", recipe="fedavg").model
        assert not torch.equal(run.model["3.weight"], averaged["3.weight"])

    @pytest.mark.parametrize("recipe", APART)
    def test_a_run_that_was_cut_off_goes_on_bit_for_bit(self, tmp_path, recipe):
        whole = Run(tmp_path / "whole", 4, recipe=recipe)
        cut = Run(tmp_path / "cut", 2, recipe=recipe)
        resumed = Run(tmp_path, 4, recipe=recipe, resume=str(cut.result.folder))
        assert equal(resumed.model, whole.model)
        assert [r.choice for r in resumed.result.reports] == [r.choice for r in whole.result.reports]


class TestOwnStarts:
    def test_layers_are_fitted_to_what_aligned_models_compute(self, tmp_path, monkeypatch):
        monkeypatch.setattr("fedbasin.server.run.composition.find_norms", lambda model: ())
        run = Run(tmp_path, recipe="features", align="client", start="own", ridge=0.03)
        assert [s.stage for s in run.stages()] == ["bootstrap", "fuse", "fit", "fit", "probe"]
        moved = [space.moved for c in run.stages()[1].clients for space in c.alignment.spaces]
        assert any(moved)
        close(run.model, directly(run, "features", 0.03))

    @pytest.mark.parametrize("recipe", FITTED)
    def test_every_recipe_gets_through_them(self, tmp_path, recipe):
        config = {"align": "client", "start": "own", "fraction_evaluate": 1.0}
        run = Run(tmp_path, 2, recipe=recipe, **config)
        fuse, *fits = STAGES[recipe]
        stages = [s.stage for s in run.stages()]
        # A recipe that compares looks at the anchor with a head too, which is one client's model, fits all layers, and
        # steps on from the best of them.
        if RECIPES[recipe].chooses:
            fits = [
                "head",
                "probe",
                "fit",
                "head",
                "probe",
                "probe",
                "trial",
                "scale",
                "steps",
                "measure",
                "head",
                "probe",
            ]
        expected = ["bootstrap", fuse, "measure", *fits, "evaluate"]
        # Nothing is tried where the mean is the best of the round's models, and one client's model is not scaled.
        optional = {"trial", "scale"}
        assert [stage for stage in stages if stage not in optional] == [s for s in expected if s not in optional]
        assert set(stages) <= set(expected)
        assert run.result.reports[-1].metrics["accuracy"] > 0.4

    def test_layers_that_nobody_can_fit_leave_the_head(self, tmp_path):
        run = Run(tmp_path, 1, failing("fit"), recipe="auto", align="client", start="own")
        stages = [stage.stage for stage in run.stages()]
        assert stages[:8] == ["bootstrap", "fuse", "measure", "head", "probe", "fit", "head", "probe"]
        assert run.result.reports[0].choice.served != "average"

    def test_layers_whose_sums_are_too_large_are_not_fitted_unasked(self, tmp_path, monkeypatch):
        monkeypatch.setattr(fit_plan, "_MOST_SUMS", 0)
        stages = [stage.stage for stage in Run(tmp_path, recipe="auto", align="client", start="own").stages()]
        assert "fit" not in stages
        asked = Run(tmp_path / "asked", recipe="features", align="client", start="own")
        assert "fit" in [stage.stage for stage in asked.stages()]

    def test_the_model_after_further_steps_is_served_where_it_is_no_worse(self, tmp_path):
        run = Run(tmp_path, recipe="auto", align="client", start="own")
        before = Run(tmp_path / "before", 1, failing("steps"), recipe="auto", align="client", start="own")
        choice, without = run.result.reports[0].choice, before.result.reports[0].choice
        assert choice.served == "stepped"
        assert choice.loss <= without.loss
        assert choice.accuracy >= without.accuracy
        assert not equal(run.model, before.model)
        # The next round trains on the same model, which nothing has stepped from.
        assert equal(*({n: torch.tensor(a.numpy()) for n, a in r.result.trained_arrays.items()} for r in (run, before)))

    def test_further_steps_of_one_client_are_bounded_by_the_others(self, tmp_path):
        def far(run, node, stage, reply):
            if stage != "steps" or node != NODES[-1]:
                return reply
            sent = Reply.from_message(reply.content, run.request)
            moved = {n: 1e3 * t if t.is_floating_point() else t for n, t in sent.parameters.items()}
            content = replace(sent, parameters=moved).to_content(run.request, packed=True)
            return Message(content=content, reply_to=run.federation.asked[-1])

        run = Run(tmp_path, 1, far, recipe="auto", align="client", start="own")
        (steps,) = [stage for stage in run.stages() if stage.stage == "steps"]
        honest, hostile = steps.clients[:-1], steps.clients[-1]
        assert all(client.detail == "" for client in honest)
        assert hostile.outcome == "out_of_line" or "norm" in hostile.detail

    def test_a_client_trains_once_a_round(self, tmp_path):
        run = Run(tmp_path, recipe="features", align="client", start="own")
        assert sorted(run.app.trained) == [(node, 1) for node in NODES]
