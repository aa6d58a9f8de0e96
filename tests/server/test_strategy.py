"""FedBasin as Flower's own loop calls it, with real client apps."""

import logging

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from fedbasin.client import basin
from fedbasin.server.run.settings import SettingsError
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.judging.outcomes import Outcome
from fedbasin.strategies.recipes import RECIPES
from tests import tiny
from tests.server.flowers_loop import (
    BAD,
    arrays_of,
    fed_basin,
    flowers_fedavg,
    grid_of,
    is_finite,
    nan,
    nan_in_training,
    refused,
    start,
    state_of,
)


def number_arrays(message, context, call_next):
    """Stands for an app whose arrays are called 0, 1, 2, as a list of NumPy arrays is."""
    arrays = message.content["arrays"]
    names = list(tiny.net().state_dict())
    assert list(arrays) == [str(number) for number in range(len(names))]
    named = ArrayRecord(dict(zip(names, arrays.values(), strict=True)))
    message.content = RecordDict({**message.content, "arrays": named})
    reply = call_next(message, context)
    if "model" in reply.content:
        arrays = reply.content["model"].values()
        reply.content["model"] = ArrayRecord({str(n): array for n, array in enumerate(arrays)})
    return reply


def silent(reply):
    return None


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
                fed_basin(recipe, tiny.symmetry(), align=align)
            return
        strategy = fed_basin(recipe, tiny.symmetry(), model=tiny.net(), align=align, packed=packed)
        result = start(strategy, tiny.federation(), 2)
        assert strategy.refusals == {}
        assert is_finite(result)
        assert list(result.arrays) == list(tiny.net().state_dict())
        assert result.evaluate_metrics_clientapp[2]["accuracy"] > 0.4
        losses = [result.train_metrics_clientapp[number]["loss"] for number in (1, 2)]
        assert losses[1] < losses[0]

    def test_fedavg_without_alignment_is_flowers_fedavg(self):
        ours = start(fed_basin(align="off"), tiny.federation(), 2)
        flowers = start(flowers_fedavg(), tiny.federation(), 2)
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
        result = start(fed_basin(), tiny.federation())
        assert state_of(result)["1.num_batches_tracked"].dtype == torch.int64
        assert state_of(start(flowers_fedavg(), tiny.federation()))["1.num_batches_tracked"].dtype == (torch.float64)

    @pytest.mark.parametrize(
        ("tamper", "outcome"),
        [(nan, Outcome.non_finite), (another_shape, Outcome.wrong_shape), (silent, Outcome.timeout)],
    )
    def test_a_bad_reply_does_not_end_the_run(self, tamper, outcome, caplog):
        only_training = {BAD: lambda reply: tamper(reply) if "arrays" in reply.content else reply}
        strategy = fed_basin()
        with caplog.at_level(logging.WARNING, "flwr.fedbasin"):
            result = start(strategy, tiny.federation(tamper=only_training), 2)
        assert refused(strategy) == {BAD: outcome}
        assert f"node {BAD}: {outcome.name}" in caplog.text
        others = tiny.federation()
        del others.contexts[BAD]
        expected = start(fed_basin(nodes=2), others, 2)
        assert all(torch.equal(t, state_of(expected)[n]) for n, t in state_of(result).items())

    def test_an_error_that_the_superlink_signs_names_the_node_that_was_asked(self):
        federation = tiny.federation()

        def lost(reply):
            error = Message(Error(5, "gone"), reply_to=federation.asked[-1])
            error.metadata.__dict__["_src_node_id"] = 1
            return error

        federation.tamper = {BAD: lost}
        strategy = fed_basin()
        assert is_finite(start(strategy, federation))
        assert refused(strategy) == {BAD: Outcome.unavailable}

    def test_bad_metrics_do_not_end_the_evaluation(self):
        def spoiled(reply):
            if "arrays" not in reply.content:
                reply.content["metrics"] = MetricRecord({"f1": 3.0, "num-examples": -2})
            return reply

        result = start(fed_basin(), tiny.federation(tamper={BAD: spoiled}))
        assert set(result.evaluate_metrics_clientapp[1]) == {"accuracy"}

    def test_a_round_that_nobody_answered_well_keeps_the_model(self):
        federation = tiny.federation(tamper=dict.fromkeys((100, 101, 102), nan_in_training))
        strategy = fed_basin()
        result = start(strategy, federation)
        assert result.arrays is None or not len(result.arrays)
        assert len(strategy.refusals) == 3

    def test_replies_that_nobody_asked_for_are_left_out(self):
        federation, strategy = tiny.federation(), fed_basin()
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
        with pytest.raises(RuntimeError, match="call configure_train before aggregate_train"):
            FedBasin().aggregate_train(1, [])
        with pytest.raises(RuntimeError, match="call configure_evaluate before aggregate_evaluate"):
            FedBasin().aggregate_evaluate(1, [])

    def test_an_unknown_recipe_is_refused_with_the_catalogue(self):
        with pytest.raises(SettingsError, match="'mean': choose one of auto, auto-features, fedavg"):
            FedBasin("mean")

    @pytest.mark.parametrize(
        "recipe", [name for name in tiny.OF_ANY_MODEL if RECIPES[name].refit and not RECIPES[name].chooses]
    )
    def test_a_recipe_of_several_stages_is_refused_with_a_way_to_run_it(self, recipe):
        strategy, grid = (fed_basin(recipe, model=tiny.net(), align="off"), grid_of(tiny.federation()))
        with pytest.raises(SettingsError, match=r"several times a round.*FedBasin\.start"):
            strategy.configure_train(1, arrays_of(tiny.net()), ConfigRecord(), grid)

    def test_a_search_for_an_anchor_is_refused_with_a_way_to_run_it(self):
        strategy = fed_basin(symmetry=tiny.symmetry(), start="own")
        grid = grid_of(tiny.federation())
        with pytest.raises(SettingsError, match=r"searches for an anchor.*FedBasin\.start"):
            strategy.configure_train(1, arrays_of(tiny.net()), ConfigRecord(), grid)
        strategy = fed_basin(align="off", start="own")
        assert strategy.configure_train(1, arrays_of(tiny.net()), ConfigRecord(), grid)

    def test_a_fraction_of_zero_asks_nobody_and_changes_nothing(self):
        grid, arrays = grid_of(tiny.federation()), arrays_of(tiny.net())
        strategy = fed_basin(fraction_train=0.0, fraction_evaluate=0.0)
        assert strategy.configure_train(1, arrays, ConfigRecord(), grid) == []
        assert strategy.aggregate_train(1, []) == (None, None)
        assert strategy.configure_evaluate(1, arrays, ConfigRecord(), grid) == []
        assert strategy.aggregate_evaluate(1, []) is None

    @pytest.mark.parametrize("align", ["client", "server", "off"])
    def test_its_own_start_ends_in_the_same_model(self, align, tmp_path):
        whose = tiny.symmetry()
        flowers = start(fed_basin(symmetry=whose, align=align), tiny.federation(), 2)
        strategy = fed_basin(symmetry=whose, align=align, folder=tmp_path, poll_seconds=0.001)
        ours = strategy.start(tiny.federation().grid(), arrays_of(tiny.net()), 2)
        assert state_of(ours).keys() == state_of(flowers).keys()
        assert all(torch.equal(t, state_of(ours)[n]) for n, t in state_of(flowers).items())
        assert ours.train_metrics_clientapp == flowers.train_metrics_clientapp
        assert ours.evaluate_metrics_clientapp == flowers.evaluate_metrics_clientapp

    @pytest.mark.parametrize("recipe", ["fedavg", "regmean"])
    @pytest.mark.parametrize("packed", [True, False])
    def test_arrays_that_the_app_numbers_are_the_models_tensors(self, recipe, packed):
        settings = {"symmetry": tiny.symmetry(), "model": tiny.net(), "packed": packed}
        app = tiny.make_app([basin(model=tiny.own_net, data=tiny.batches), number_arrays])
        strategy = fed_basin(recipe, **settings)
        numbered = ArrayRecord([t.numpy() for t in tiny.net().state_dict().values()])
        result = Strategy.start(strategy, grid_of(tiny.federation(app=app)), numbered, 1)
        assert strategy.refusals == {}
        expected = start(fed_basin(recipe, **settings), tiny.federation())
        assert list(result.arrays) == [str(number) for number in range(len(numbered))]
        pairs = zip(state_of(result).values(), state_of(expected).values(), strict=True)
        assert all(torch.equal(tensor, other) for tensor, other in pairs)

    def test_clients_without_the_mod_are_averaged_as_by_flower(self):
        app = tiny.make_app(mods=[])
        ours = start(fed_basin(align="off"), tiny.federation(app=app), 2)
        strategy = fed_basin(symmetry=tiny.symmetry(), align="client")
        start(strategy, tiny.federation(app=app), 2)
        assert strategy.refusals == {}
        with_mod = start(fed_basin(align="off"), tiny.federation(), 2)
        assert all(torch.equal(t, state_of(ours)[n]) for n, t in state_of(with_mod).items())

    @pytest.mark.parametrize("recipe", ["fisher", "regmean", "kfac"])
    def test_clients_without_the_mod_are_refused_where_it_is_needed(self, recipe):
        strategy = fed_basin(recipe, model=tiny.net(), align="off")
        start(strategy, tiny.federation(app=tiny.make_app(mods=[])))
        assert refused(strategy) == dict.fromkeys((100, 101, 102), Outcome.missing_mod)
        assert "add to the client" in strategy.refusals[BAD].detail
