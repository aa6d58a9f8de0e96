"""Every robust rule around every recipe, under every way of aligning: a hostile client is outvoted, and nothing stays."""

from itertools import product

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedbasin.proto.header import STATISTICS
from fedbasin.server.exchange.quorum import QuorumLostError
from fedbasin.server.run.settings import SettingsError, read_settings
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.fusion.rules.robust.robust_rules import COUNTED, ROBUST_RULES, robust_rule
from fedbasin.strategies.recipes import RECIPES, LoraProducts
from tests import tiny
from tests.running import run
from tests.server.flowers_loop import nan_in_training

CLIENTS = 7
HOSTILE = 103
# Adapters' recipes run in test_one_loop.py, whose model has adapters, and those of analytic networks in a file of their own.
WRAPPED = tiny.OF_ANY_MODEL
ALIGNS = ("client", "server", "off")
# One in the default suite for each rule with each way of aligning, and for each recipe; all of them under `slow`.
SAMPLE = {
    *((rule, recipe, align) for rule, align in product(ROBUST_RULES, ALIGNS) for recipe in ("fedavg", "regmean")),
    *(("geometric-median", recipe, "client") for recipe in WRAPPED),
}


def is_possible(recipe, align):
    try:
        RECIPES[recipe].check_align(align)
    except ValueError:
        return False
    return True


CASES = [
    pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow)
    for case in product(ROBUST_RULES, WRAPPED, ALIGNS)
    if is_possible(*case[1:])
]


def amplify(reply: Message) -> Message:
    """Multiply all that a client sends, weights and statistics, by a large factor."""
    if reply.has_error():
        return reply
    content = reply.content
    for name in ("arrays", STATISTICS):
        if name in content:
            arrays = {key: array.numpy() for key, array in content[name].items()}
            changed = {key: a * 1e12 if a.dtype.kind == "f" else a for key, a in arrays.items()}
            content[name] = ArrayRecord({key: Array(a.astype(arrays[key].dtype)) for key, a in changed.items()})
    reply.content = RecordDict(dict(content.items()))
    return reply


def robust_settings(rule):
    return {"robust": rule, "hostile_clients": 1} if rule in COUNTED else {"robust": rule}


def robust_run(tmp_path, rule, tamper=None, clients=CLIENTS, **more):
    federation = tiny.federation(clients, tamper=tamper, min_train_nodes=clients, folder=str(tmp_path))
    settings = {"fraction_evaluate": 0.0, **robust_settings(rule), **more}
    return run(federation, tiny.net(), symmetry=tiny.symmetry(), **settings)


def files_beside(folder, runs):
    """Files in the folder of runs that are not in the folder of this run."""
    return {path for path in runs.rglob("*") if path.is_file() and folder not in path.parents}


@pytest.mark.parametrize(("rule", "recipe", "align"), CASES)
def test_one_hostile_client_moves_the_model_by_a_bounded_distance(rule, recipe, align, tmp_path):
    result = robust_run(tmp_path, rule, {HOSTILE: amplify}, recipe=recipe, align=align)
    accepted = [client for client in result.reports[0].stages[0].clients if client.is_accepted]
    start = tiny.net().state_dict()
    moved = max(float((t - start[n]).abs().max()) for n, t in result.state_dict.items() if t.is_floating_point())
    assert len(accepted) == CLIENTS
    assert any(rule in client.detail for client in accepted if client.node_id == HOSTILE)
    assert all(bool(t.isfinite().all()) for t in result.state_dict.values())
    # A weight of the client is of the order of 1e12. Honest weights move by less than 1, closed-form heads by 20.
    assert moved < 100
    assert result.state_dict["1.num_batches_tracked"] == 3
    assert files_beside(result.folder, tmp_path) == set()


def test_without_a_rule_or_bounds_the_same_client_takes_the_model_over(tmp_path):
    tamper = {HOSTILE: amplify}
    federation = tiny.federation(CLIENTS, tamper=tamper, folder=str(tmp_path), fraction_evaluate=0.0, bounds=False)
    state = run(federation, tiny.net(), symmetry=tiny.symmetry(), align="off").state_dict
    assert max(float(t.abs().max()) for t in state.values()) > 1e9


@pytest.mark.parametrize("rule", ROBUST_RULES)
def test_too_few_replies_for_the_rule_end_the_round_by_name_and_leave_no_file(rule, tmp_path):
    spoiled = dict.fromkeys(range(100, 100 + CLIENTS - 2), nan_in_training)
    least = robust_rule(rule, int(rule in COUNTED)).least
    with pytest.raises(QuorumLostError, match=f"2 of {CLIENTS} clients accepted, {least} needed by the rule") as lost:
        robust_run(tmp_path, rule, spoiled, quorum=0.1, attempts=1)
    # No quorum makes the rule need fewer.
    assert "fedbasin.quorum" not in str(lost.value)
    assert "fedbasin.min-train-nodes" in str(lost.value)
    assert files_beside(tmp_path / "1", tmp_path) == set()


def test_a_rule_holds_in_rounds_that_average_too():
    composed = read_settings({}, {"recipe": "auto-features", "robust": "median", "min-train-nodes": 3}).composed
    assert composed.robust == composed.averaging.robust
    assert composed.robust is not None


@pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if isinstance(r.fusion, LoraProducts)])
def test_sums_of_products_are_refused_with_the_recipes_that_can_be_wrapped(recipe):
    with pytest.raises(SettingsError, match="choose the recipe lora-rotated, lora-factors, ffa-lora, rolora or lorm"):
        FedBasin(recipe, robust="median", min_train_nodes=3)


def test_independent_initialisations_meet_in_the_medoid_and_not_in_a_hostile_model(tmp_path):
    result = robust_run(tmp_path, "median", {100: amplify}, align="client", start="own", bootstrap="medoid", clients=5)
    assert max(float(t.abs().max()) for t in result.state_dict.values()) < 100


def test_a_run_can_only_be_resumed_with_the_same_rule(tmp_path):
    folder = robust_run(tmp_path, "median").folder
    with pytest.raises(SettingsError, match="use the same settings"):
        robust_run(tmp_path, "geometric-median", resume=str(folder))
    torch.testing.assert_close(
        robust_run(tmp_path, "median", resume=str(folder)).state_dict, robust_run(tmp_path / "b", "median").state_dict
    )
