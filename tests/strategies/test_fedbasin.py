"""FedBasin under Flower's own loop and under its differential-privacy wrappers, with real client apps."""

import logging

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from torch import nn

from fedbasin.client import basin
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.fusion.layers import known_blocks
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.outcomes import Outcome
from fedbasin.strategies.tensors.state import distance
from tests import tiny
from tests.server.fake_grid import FakeGrid

BAD = 101


class ListGrid(FakeGrid):
    """Gives all replies as one list, as Flower's own grid does."""

    def send_and_receive(self, messages, *, timeout=None):
        keys = self.push_messages(list(messages))
        return self.pull_messages([key for key in keys if key])


def grid_of(federation):
    return ListGrid(federation.contexts, federation.answer)


def arrays_of(model):
    return ArrayRecord(model.state_dict())


def start(strategy, federation, rounds=1, model=None):
    return strategy.start(grid_of(federation), arrays_of(model or tiny.net()), rounds)


def sampled(nodes=3):
    return FedAvg(min_available_nodes=nodes, min_train_nodes=nodes, min_evaluate_nodes=nodes)


def state_of(result):
    return result.arrays.to_torch_state_dict()


def is_finite(result):
    return all(bool(t.isfinite().all()) for t in state_of(result).values())


def silent(reply):
    return None


def nan(reply):
    state = reply.content["arrays"].to_torch_state_dict()
    state["0.weight"][0, 0] = float("nan")
    reply.content["arrays"] = ArrayRecord(state)
    return reply


def another_shape(reply):
    state = reply.content["arrays"].to_torch_state_dict()
    reply.content["arrays"] = ArrayRecord({**state, "0.weight": torch.ones(1)})
    return reply


class TestUnderFlowersOwnLoop:
    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("align", ["client", "server", "off"])
    @pytest.mark.parametrize("recipe", ["fedavg", "regmean", "fisher"])
    def test_every_recipe_of_one_stage_runs(self, recipe, align, packed):
        if (recipe, align) == ("fisher", "server"):
            with pytest.raises(ValueError, match="set align = 'client'"):
                FedBasin(recipe, tiny.symmetry(), align=align)
            return
        blocks = known_blocks(tiny.net(), RECIPES[recipe].statistic)
        strategy = FedBasin(
            recipe, tiny.symmetry(), align=align, blocks=blocks, packed=packed, sampling=sampled()
        )
        result = start(strategy, tiny.federation(), 2)
        assert strategy.refusals == {}
        assert is_finite(result)
        assert list(result.arrays) == list(tiny.net().state_dict())
        assert result.evaluate_metrics_clientapp[2]["accuracy"] > 0.4
        losses = [result.train_metrics_clientapp[number]["loss"] for number in (1, 2)]
        assert losses[1] < losses[0]

    def test_fedavg_without_alignment_is_flowers_fedavg(self):
        ours = start(FedBasin(align="off", sampling=sampled()), tiny.federation(), 2)
        flowers = start(sampled(), tiny.federation(), 2)
        for name, tensor in state_of(flowers).items():
            if name.endswith("running_var"):
                # What clients' means differ by is part of the variance.
                assert (state_of(ours)[name] > tensor).all()
            elif tensor.dtype == torch.float32:
                torch.testing.assert_close(state_of(ours)[name], tensor)
        assert ours.train_metrics_clientapp[2]["loss"] == pytest.approx(
            flowers.train_metrics_clientapp[2]["loss"], rel=1e-4
        )
        assert dict(ours.evaluate_metrics_clientapp[2]) == pytest.approx(
            dict(flowers.evaluate_metrics_clientapp[2]),
            rel=0.02,  # for the variance alone; all else is equal, as it says above
        )

    def test_counters_stay_counters(self):
        result = start(FedBasin(sampling=sampled()), tiny.federation())
        assert state_of(result)["1.num_batches_tracked"].dtype == torch.int64
        assert state_of(start(sampled(), tiny.federation()))["1.num_batches_tracked"].dtype == (
            torch.float64
        )

    @pytest.mark.parametrize(
        ("tamper", "outcome"),
        [
            (nan, Outcome.non_finite),
            (another_shape, Outcome.wrong_shape),
            (silent, Outcome.timeout),
        ],
    )
    def test_a_bad_reply_does_not_end_the_run(self, tamper, outcome, caplog):
        only_training = {BAD: lambda reply: tamper(reply) if "arrays" in reply.content else reply}
        strategy = FedBasin(sampling=sampled())
        with caplog.at_level(logging.WARNING, "flwr.fedbasin"):
            result = start(strategy, tiny.federation(tamper=only_training), 2)
        assert {node: r.outcome for node, r in strategy.refusals.items()} == {BAD: outcome}
        assert f"node {BAD}: {outcome.name}" in caplog.text
        others = tiny.federation()
        del others.contexts[BAD]
        expected = start(FedBasin(sampling=sampled(2)), others, 2)
        assert all(torch.equal(t, state_of(expected)[n]) for n, t in state_of(result).items())

    def test_an_error_that_the_superlink_signs_names_the_node_that_was_asked(self):
        federation = tiny.federation()

        def lost(reply):
            error = Message(Error(5, "gone"), reply_to=federation.asked[-1])
            error.metadata.__dict__["_src_node_id"] = 1
            return error

        federation.tamper = {BAD: lost}
        strategy = FedBasin(sampling=sampled())
        assert is_finite(start(strategy, federation))
        assert {n: r.outcome for n, r in strategy.refusals.items()} == {BAD: Outcome.unavailable}

    def test_bad_metrics_do_not_end_the_evaluation(self):
        def spoiled(reply):
            if "arrays" not in reply.content:
                reply.content["metrics"] = MetricRecord({"f1": 3.0, "num-examples": -2})
            return reply

        result = start(FedBasin(sampling=sampled()), tiny.federation(tamper={BAD: spoiled}))
        assert set(result.evaluate_metrics_clientapp[1]) == {"accuracy"}

    def test_a_round_that_nobody_answered_well_keeps_the_model(self):
        federation = tiny.federation(tamper=dict.fromkeys((100, 101, 102), nan_in_training))
        strategy = FedBasin(sampling=sampled())
        result = start(strategy, federation)
        assert result.arrays is None or not len(result.arrays)
        assert len(strategy.refusals) == 3

    def test_replies_that_nobody_asked_for_are_left_out(self):
        federation, strategy = tiny.federation(), FedBasin(sampling=sampled())
        grid = grid_of(federation)
        arrays = arrays_of(tiny.net())
        messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
        replies = grid.send_and_receive(messages)
        once, _ = strategy.aggregate_train(1, iter(replies))
        messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
        again = grid.send_and_receive(messages)
        twice, _ = strategy.aggregate_train(1, iter([*again, again[0], replies[1]]))
        same = [(once[name].data, twice[name].data) for name in once]
        assert all(a == b for a, b in same)

    def test_a_round_must_be_configured_first(self):
        with pytest.raises(RuntimeError, match="call configure_train first"):
            FedBasin().aggregate_train(1, [])

    def test_an_unknown_recipe_is_refused_with_the_catalogue(self):
        with pytest.raises(ValueError, match="'mean'; there are fedavg, fedavgm, fisher"):
            FedBasin("mean")

    @pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.fits])
    def test_a_recipe_of_several_stages_is_refused_with_a_way_to_run_it(self, recipe):
        with pytest.raises(ValueError, match=r"several times a round.*fedbasin\.server\.serve"):
            FedBasin(recipe, align="off")


def nan_in_training(reply):
    return nan(reply) if reply.has_content() and "arrays" in reply.content else reply


NORM = 0.5


def server_side(strategy, noise=0.0, norm=NORM):
    return DifferentialPrivacyServerSideFixedClipping(strategy, noise, norm, 3)


def client_side(strategy, noise=0.0, norm=NORM):
    return DifferentialPrivacyClientSideFixedClipping(strategy, noise, norm, 3)


def private(wrap, clients=3, **more):
    """Clients as the wrapper needs them; their alignment stands outside, so that it follows clipping."""
    mods = [fixedclipping_mod] if wrap is client_side else None
    return tiny.federation(clients, tiny.make_app(train_mods=mods), **more)


@pytest.mark.parametrize("wrap", [server_side, client_side])
class TestUnderDifferentialPrivacy:
    @pytest.mark.parametrize("align", ["client", "server", "off"])
    def test_fedavg_runs_with_noise(self, wrap, align):
        np.random.seed(0)  # noqa: NPY002 - where Flower draws its noise
        strategy = FedBasin(symmetry=tiny.symmetry(), align=align, sampling=sampled())
        result = start(wrap(strategy, noise=0.01), private(wrap), 3)
        assert strategy.refusals == {}
        assert is_finite(result)
        assert result.evaluate_metrics_clientapp[3]["accuracy"] > 0.3

    @pytest.mark.parametrize("align", ["client", "server"])
    def test_the_mean_is_no_further_from_the_anchor_than_the_clipping_norm(self, wrap, align):
        strategy = FedBasin(symmetry=tiny.symmetry(), align=align, sampling=sampled())
        moved = [
            distance(state_of(start(w, private(wrap))), tiny.net().state_dict())
            for w in (wrap(strategy, norm=0.01), wrap(strategy, norm=1e6))
        ]
        assert moved[0] <= 0.01 * 1.0001 < moved[1]

    def test_without_noise_and_clipping_it_is_fedavg(self, wrap):
        plain = start(FedBasin(sampling=sampled()), tiny.federation())
        result = start(wrap(FedBasin(sampling=sampled()), norm=1e6), private(wrap))
        for name, tensor in state_of(plain).items():
            torch.testing.assert_close(state_of(result)[name], tensor)

    def test_a_scalar_counter_passes_and_stays_as_it_was(self, wrap):
        result = start(wrap(FedBasin(sampling=sampled()), noise=0.01), private(wrap))
        counter = state_of(result)["1.num_batches_tracked"]
        assert (counter.dtype, int(counter)) == (torch.int64, 0)

    def test_a_bad_reply_does_not_end_the_run(self, wrap):
        federation = private(wrap, tamper={BAD: nan_in_training})
        strategy = FedBasin(sampling=sampled())
        result = start(wrap(strategy), federation, 2)
        assert {n: r.outcome for n, r in strategy.refusals.items()} == {BAD: Outcome.non_finite}
        assert is_finite(result)

    def test_a_clients_error_skips_the_round_and_the_next_one_counts(self, wrap):
        federation = private(wrap)
        federation.contexts[BAD].run_config["fail"] = True

        def recover(reply):
            federation.contexts[BAD].run_config["fail"] = False
            return reply

        federation.tamper = {BAD: recover}
        result = start(wrap(FedBasin(sampling=sampled())), federation, 2)
        assert list(result.train_metrics_clientapp) == [2]
        assert is_finite(result)


class TestIntegerBuffersUnderDifferentialPrivacy:
    """What FedBasin's docstring warns of: Flower's clipping scales every array of more than no dimension."""

    def net(self, persistent):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(tiny.PIXELS, tiny.CLASSES))
        model.register_buffer("positions", torch.arange(5), persistent=persistent)
        return model

    def federation(self, model):
        app = ClientApp(mods=[basin(model=lambda context: model())])

        @app.train()
        def train(message, context):
            own = model()
            own.load_state_dict(message.content["arrays"].to_torch_state_dict())
            own[0].bias.data += 1
            metrics = MetricRecord({"num-examples": 5})
            content = RecordDict({"arrays": arrays_of(own), "metrics": metrics})
            return Message(content, reply_to=message)

        return tiny.federation(3, app)

    def wrapped(self):
        sampling = FedAvg(fraction_evaluate=0.0, min_available_nodes=3, min_train_nodes=3)
        return server_side(FedBasin(sampling=sampling), norm=0.1)

    def test_in_the_state_dict_they_stop_flowers_wrapper(self):
        federation = self.federation(lambda: self.net(persistent=True))
        with pytest.raises(TypeError, match="Cannot cast ufunc 'multiply'"):
            start(self.wrapped(), federation, model=self.net(persistent=True))

    def test_out_of_the_state_dict_all_is_well(self):
        federation = self.federation(lambda: self.net(persistent=False))
        model = self.net(persistent=False)
        result = start(self.wrapped(), federation, model=model)
        assert distance(state_of(result), model.state_dict()) == pytest.approx(0.1, rel=1e-4)
