"""A run whose clients may send only so many bytes of statistics."""

import re

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord

from fedbasin.proto.header import STATISTICS
from fedbasin.server.run.settings import SettingsError
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.fusion.compression.budget import BudgetError, choose, spent
from fedbasin.strategies.fusion.layers import gram_layers
from fedbasin.strategies.recipes import RECIPES
from tests import running, tiny

LAYERS = gram_layers(tiny.net())
# Of one array: less than the header of an .npy file takes.
HEADER = 128


def needs(recipe, share):
    """Bytes between the cheapest forms, of a share of 0, and the exact ones."""
    moments = RECIPES[recipe].refit is not None
    most = spent(LAYERS, choose(LAYERS, 0, cross_moments=moments), cross_moments=moments)
    with pytest.raises(BudgetError) as refused:
        choose(LAYERS, 1, cross_moments=moments)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    return least + int(share * (most - least))


def run(recipe, budget, folder, **more):
    settings = {"recipe": recipe, "statistics_budget_bytes": budget, "folder": str(folder), "fraction_evaluate": 0.0}
    federation = tiny.federation(**settings, **{"align": "off", **more})
    sent = {}

    def weigh(node, reply):
        if not reply.has_error() and STATISTICS in reply.content:
            arrays = reply.content[STATISTICS].values()
            values = sum(len(array.data) - HEADER for array in arrays)
            sent[node] = sent.get(node, 0) + values
        return reply

    federation.tamper = {node: lambda reply, node=node: weigh(node, reply) for node in federation.contexts}
    symmetry = tiny.symmetry() if "start" in more else None
    return running.run(federation, tiny.net(), symmetry=symmetry), sent


@pytest.mark.parametrize(("share", "fitted"), [(0.9, {"fit", "head"}), (0.0, {"fit", "head"}), (-0.2, {"head"})])
@pytest.mark.parametrize("recipe", ["auto", "auto-features"])
def test_all_fits_after_own_starts_share_the_budget(recipe, share, fitted, tmp_path):
    budget = 3 * needs("features", max(share, 0.0))
    if share < 0 and recipe == "auto":
        # Enough for a head alone, three times.
        budget -= 3
    elif share < 0:
        pytest.skip("this recipe is refused where its layers are above the budget")
    result, sent = run(recipe, budget, tmp_path, start="own", align="client")
    assert len(sent) == 3
    assert max(sent.values()) <= budget
    assert {stage.stage for stage in result.reports[0].stages} & {"fit", "head"} == fitted


@pytest.mark.parametrize("recipe", ["auto", "auto-features"])
def test_a_budget_that_three_fits_are_above_is_refused_before_the_first_message(recipe, tmp_path):
    with pytest.raises(SettingsError, match=r"set at least .*each of 3 fits"):
        run(recipe, 30, tmp_path, start="own", align="client")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.9, 0.5, 0.0])
@pytest.mark.parametrize("recipe", ["regmean", "features", "regmean++", "auto-features"])
def test_no_client_sends_more_than_the_budget(recipe, share, tmp_path):
    budget = needs(recipe, share)
    result, sent = run(recipe, budget, tmp_path)
    assert len(sent) == 3
    assert max(sent.values()) <= budget
    (report,) = result.reports
    assert all(c.outcome == "accepted" for stage in report.stages for c in stage.clients)
    told = {}
    for stage in report.stages:
        told |= stage.encodings
    assert set(told) == {layer.block for layer in LAYERS}
    assert all(torch.isfinite(t).all() for t in result.state_dict.values())


def test_without_a_bound_requests_and_reports_stay_as_they_were(tmp_path):
    result, _ = run("regmean", 0, tmp_path)
    assert not any(stage.encodings for stage in result.reports[0].stages)


@pytest.mark.parametrize("recipe", ["regmean", "features", "auto-features", "head"])
def test_a_budget_that_nothing_fits_is_refused_before_the_first_message(recipe, tmp_path):
    with pytest.raises(SettingsError, match=r"statistics-budget-bytes = 7, .* set at least"):
        run(recipe, 7, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_statistics_needs_no_budget(tmp_path):
    run("fedavg", 7, tmp_path)


def test_nearly_all_bytes_give_nearly_the_same_model(tmp_path):
    exact, _ = run("features", 0, tmp_path / "exact")
    rounded, _ = run("features", needs("features", 0.7), tmp_path / "rounded")
    for name, tensor in exact.state_dict.items():
        torch.testing.assert_close(rounded.state_dict[name], tensor, rtol=1e-2, atol=1e-2)


class TestUnderFlowersOwnLoop:
    def test_a_budget_is_kept_too(self):
        budget = needs("regmean", 0.5)
        strategy = FedBasin(
            "regmean",
            model=tiny.net(),
            align="off",
            statistics_budget_bytes=budget,
            min_train_nodes=3,
            min_available_nodes=3,
            fraction_evaluate=0.0,
        )
        federation = tiny.federation()
        grid = federation.grid()
        arrays = ArrayRecord(tiny.net().state_dict())
        messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
        replies = grid.pull_messages(grid.push_messages(messages))
        fused, _ = strategy.aggregate_train(1, replies)
        assert strategy.refusals == {}
        assert fused is not None
        for reply in replies:
            statistics = reply.content[STATISTICS].values()
            assert sum(len(array.data) - HEADER for array in statistics) <= budget

    def test_it_needs_the_layers(self):
        federation = tiny.federation()
        strategy = FedBasin("regmean", statistics_budget_bytes=1000)
        arrays = ArrayRecord(tiny.net().state_dict())
        with pytest.raises(SettingsError, match=r"needs the layers.*pass model=Net\(\)"):
            strategy.configure_train(1, arrays, ConfigRecord(), federation.grid())
        assert not federation.asked
