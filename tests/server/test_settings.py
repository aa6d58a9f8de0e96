"""Every wrong setting is refused before anything is sent, by key, value and remedy."""

import math
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fedbasin.server.run.settings import Settings, SettingsError, read_settings
from fedbasin.server.strategy import FedBasin
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.server_optimizers import SERVER_OPTIMIZERS
from tests import running, tiny

# key, value, what the message says beside them
WRONG = [
    ("recipe", "fedprox", "choose one of auto, auto-features, fedavg, fedavgm"),
    ("recipe", 3, "string"),
    ("fit", "model", "'layer' or 'block'"),
    ("server-optimizer", "sgd", "choose one of replace, average, ema, momentum, adam, yogi"),
    ("server-optimizer", 1, "string"),
    ("ridge", -0.1, "greater than or equal to 0"),
    ("ridge", math.inf, "finite"),
    ("ridge", "much", "number"),
    ("shrink", 1.5, "less than or equal to 1"),
    ("robust", "mode", "choose one of median, geometric-median"),
    ("robust", 1, "string"),
    ("hostile-clients", -1, "greater than or equal to 0"),
    ("rule", "mode", "choose one of linear, task_arithmetic"),
    ("rule", 1, "string"),
    ("align", "both", "'auto', 'client', 'server' or 'off'"),
    ("align", True, "'auto', 'client', 'server' or 'off'"),
    ("learned-steps", 0, "1"),
    ("learned-smoothing", 1.0, "less than 1"),
    ("matcher", "best", "'weights', 'sinkhorn', 'graph', 'activations' or 'learned'"),
    ("merge", "ring", "'star', 'chain' or 'tree'"),
    ("merge-heads", "heads", "'weights' or 'products'"),
    ("layers", 3, "string"),
    ("start", "cold", "'shared' or 'own'"),
    ("bootstrap", "random", "'first', 'largest', 'medoid' or 'best'"),
    ("sum", "exact", "'reproducible' or 'fast'"),
    ("barrier-points", 1, "a path has two ends"),
    ("barrier-points", 500, "less than or equal to 101"),
    ("fused-points", 102, "less than or equal to 101"),
    ("probe-share", 0, "greater than 0"),
    ("probe-clients", 1, "greater than or equal to 2"),
    ("probe-points", 4, "the middle of the path"),
    ("packed", "flat", "boolean"),
    ("min-available-nodes", 0, "greater than or equal to 1"),
    ("min-available-nodes", 2.5, "integer"),
    ("min-train-nodes", 0, "greater than or equal to 1"),
    ("min-evaluate-nodes", 0, "greater than or equal to 1"),
    ("weighted-by-key", "", "at least 1 character"),
    ("arrayrecord-key", "", "at least 1 character"),
    ("configrecord-key", "", "at least 1 character"),
    ("fraction-train", -0.1, "greater than or equal to 0"),
    ("fraction-train", 1.1, "less than or equal to 1"),
    ("fraction-evaluate", -1, "greater than or equal to 0"),
    ("quorum", 0, "greater than 0"),
    ("quorum", math.nan, "finite"),
    ("grace-seconds", -1, "greater than or equal to 0"),
    ("late-rounds", -1, "greater than or equal to 0"),
    ("attempts", 0, "greater than or equal to 1"),
    ("round-timeout-seconds", 0, "greater than 0"),
    ("wait-timeout-seconds", -3, "greater than 0"),
    ("poll-seconds", 0, "greater than 0"),
    ("max-update-bytes", 0, "greater than 0"),
    ("statistics-budget-bytes", -1, "greater than or equal to 0"),
    ("bounds", "wide", "boolean"),
    ("guard", "on", "'roll back', 'warn' or 'off'"),
    ("loss-rise", 1.0, "greater than 1"),
    ("strikes", -1, "greater than or equal to 0"),
    ("quarantine-rounds", 0, "greater than or equal to 1"),
    ("patience", -1, "greater than or equal to 0"),
    ("remembered-bytes", -1, "greater than or equal to 0"),
    ("checkpoints", 0, "greater than or equal to 1"),
    ("seed", -1, "greater than or equal to 0"),
    ("folder", 7, "path"),
    ("resume", 1, "string"),
    ("observer", 1, "string"),
    ("observer-ca", 1, "string"),
    ("observer-token-file", 1, "string"),
    ("observer-cert", 1, "string"),
    ("observer-key", 1, "string"),
    ("observer-insecure", "perhaps", "boolean"),
    ("colour", "red", "there is no such setting; known are align, arrayrecord-key, attempts"),
    ("barrier_points", 3, "there is no such setting; known are"),
]


@pytest.mark.parametrize(("key", "value", "remedy"), WRONG, ids=[f"{k}={v}" for k, v, _ in WRONG])
def test_a_wrong_value_is_refused_before_anything_is_sent(key, value, remedy):
    federation = tiny.federation()
    grid = federation.grid()
    context = federation.server_context(**{f"fedbasin.{key}": value})
    with pytest.raises(SettingsError) as refused:
        FedBasin(context=context, symmetry=tiny.symmetry())
    message = str(refused.value)
    assert f"fedbasin.{key} = {value!r}" in message
    assert remedy in message
    assert grid.pushed == 0


# Without the last, whose underscore is right in an argument.
@pytest.mark.parametrize(("key", "value", "remedy"), WRONG[:-1])
def test_a_wrong_argument_is_refused_by_its_name(key, value, remedy):
    argument = key.replace("-", "_")
    with pytest.raises(SettingsError) as refused:
        FedBasin(**{argument: value})
    assert remedy.partition("known are")[0] in str(refused.value)
    assert argument in str(refused.value) or key in str(refused.value)


def test_every_key_has_a_wrong_value_in_the_table():
    keys = {field.alias for field in Settings.model_fields.values()}
    assert {key for key, _, _ in WRONG} >= keys


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"recipe": "fisher", "align": "server"}, {}, "align = 'server'.*set align = 'client'"),
        ({"align": "client"}, {"symmetry": None}, "align = 'client' needs.*pass example=inputs.*symmetry="),
        ({"fused_points": 1}, {}, "fused-points = 1: the middle.*an odd number from 3 on"),
        ({"fused_points": 4}, {}, "fused-points = 4: the middle.*an odd number from 3 on"),
        ({"fused_points": 3, "align": "server"}, {}, "never sees.*set align = 'client'"),
        ({"learned_steps": 9}, {}, "learned-steps is read by matcher = 'learned' alone; set that, or leave"),
        ({"learned_smoothing": 0.0, "matcher": "graph"}, {}, "learned-smoothing is read by matcher = 'learned' alone"),
        ({"matcher": "activations", "align": "server"}, {}, "only clients have the data; set align = 'client'"),
        ({"layers": "nothing.*"}, {}, "layers: 'nothing.*' matches no space"),
        ({"fused_points": 3, "fraction_evaluate": 0.0}, {}, "nobody evaluates.*set a fraction"),
        (
            {"ridge": 0.5, "recipe": "fedavg"},
            {},
            "ridge = 0.5 with recipe = 'fedavg'.*set ridge = 0, or.* fisher, .*lorm",
        ),
        ({"bootstrap": "best", "start": "own"}, {}, r"'best' needs a score; pass score_fn="),
        ({"robust": "krum"}, {}, "robust = 'krum' needs the number.*set hostile-clients = 1"),
        ({"hostile_clients": 2}, {}, "without a robust rule: set robust to one of trimmed-mean, krum"),
        ({"robust": "median", "hostile_clients": 2}, {}, "told no number; set hostile-clients = 0, or.*bulyan"),
        ({"robust": "median"}, {}, "min-train-nodes = 2 .* needs 3 clients.*set min-train-nodes = 3"),
        (
            {"robust": "bulyan", "hostile_clients": 2, "min_train_nodes": 10},
            {},
            "min-train-nodes = 10 .* needs 11 clients.*set min-train-nodes = 11, or.*fewer hostile-clients",
        ),
        (
            {"robust": "median", "recipe": "lora", "min_train_nodes": 3},
            {},
            "with recipe = 'lora': .* choose the recipe lora-rotated",
        ),
        ({"robust": "median", "sum": "fast", "min_train_nodes": 3}, {}, "sum = 'fast' .* set sum = 'reproducible'"),
        (
            {"robust": "median", "start": "own", "min_train_nodes": 3},
            {},
            "bootstrap = 'first' .* set bootstrap = 'medoid'",
        ),
        (
            {"robust": "median", "start": "own", "align": "client", "merge": "tree", "min_train_nodes": 3},
            {},
            "merge = 'tree' .* set merge = 'star'",
        ),
        ({"merge_heads": "products"}, {}, "merge-heads = 'products' .* set merge = 'chain'"),
        (
            {"merge_heads": "products", "merge": "chain", "start": "own", "align": "client"},
            {},
            "no heads with a rotation .* set merge-heads = 'weights'",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config, arguments, message):
    federation = tiny.federation(**config)
    grid = federation.grid()
    with pytest.raises(SettingsError, match=message):
        running.run(federation, tiny.net(), grid=grid, **{"symmetry": tiny.symmetry(), **arguments})
    assert grid.pushed == 0


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(SettingsError, match=r"fedbasin\.attempts = 0.*; fedbasin\.seed = -1"):
        read_settings({"fedbasin.attempts": 0, "fedbasin.seed": -1})


def test_an_app_that_sets_nothing_has_defaults_that_run():
    settings = read_settings({})
    assert settings == Settings()
    assert settings.composed == RECIPES["auto"]
    assert (settings.start, settings.resume, settings.observer) == ("shared", "", "")
    assert (settings.align, settings.packed) == ("auto", False)


def test_keys_of_the_app_are_its_own():
    assert read_settings({"lr": 0.1, "recipe": "?", "fedbasin.attempts": 5}).attempts == 5


@pytest.mark.parametrize(
    ("argument", "configured", "passed"),
    [
        ("recipe", "regmean", "fisher"),
        ("fraction_train", 0.5, 0.25),
        ("min_available_nodes", 3, 4),
        ("align", "off", "client"),
        ("folder", "runs", Path("elsewhere")),
    ],
)
class TestAnArgumentAndAKey:
    def test_that_differ_are_both_named(self, argument, configured, passed):
        key = f"fedbasin.{argument.replace('_', '-')}"
        with pytest.raises(SettingsError) as refused:
            FedBasin(context=context_with(key, configured), **{argument: passed})
        message = str(refused.value)
        shown = str(passed) if isinstance(passed, Path) else passed
        assert f"FedBasin({argument}={shown!r})" in message
        assert f"{key} = {configured!r}" in message
        assert "remove one of them" in message

    def test_that_agree_are_the_setting(self, argument, configured, passed):
        key = f"fedbasin.{argument.replace('_', '-')}"
        for value in (configured, passed):
            context = context_with(key, str(value) if isinstance(value, Path) else value)
            strategy = FedBasin(context=context, **{argument: value})
            assert str(getattr(strategy.settings, argument)) == str(value)

    def test_are_the_setting_alone_too(self, argument, configured, passed):
        key = f"fedbasin.{argument.replace('_', '-')}"
        by_key, by_argument = (
            FedBasin(context=context_with(key, configured)),
            FedBasin(context=context_with("lr", 0.1), **{argument: passed}),
        )
        assert str(getattr(by_key.settings, argument)) == str(configured)
        assert str(getattr(by_argument.settings, argument)) == str(passed)


def context_with(key, value):
    return Context(1, 1, {}, RecordDict(), {key: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"arrayrecord-key": "config"},
        {"arrayrecord-key": "statistics"},
        {"configrecord-key": "fedbasin"},
        {"configrecord-key": "moving"},
    ],
)
def test_records_that_share_a_name_are_refused(settings):
    with pytest.raises(SettingsError, match=r"records need two different names.*fedbasin's own"):
        read_settings({f"fedbasin.{key}": value for key, value in settings.items()})


def test_a_recipes_former_name_is_taken_and_the_log_says_the_present_one(caplog):
    assert read_settings({"fedbasin.recipe": "auto-head"}) == Settings(recipe="auto")
    assert "auto-head is now called auto" in caplog.text


def test_a_regulariser_replaces_the_recipes_own():
    own, given = Settings(recipe="regmean"), Settings(recipe="regmean", ridge=0.5, shrink=0.9)
    assert own.composed == RECIPES["regmean"]
    assert (given.composed.weighting.ridge.strength, given.composed.shrink) == (0.5, 0.9)
    assert given.composed.statistic is own.composed.statistic


@pytest.mark.parametrize("recipe", ["fedavg", "features", "head", "lora"])
def test_shrinking_what_has_no_off_diagonal_is_refused(recipe):
    message = rf"shrink = 0.9 with recipe = '{recipe}'.*choose one of regmean, lora-gram, lorm"
    with pytest.raises(SettingsError, match=message):
        read_settings({"fedbasin.recipe": recipe, "fedbasin.shrink": 0.9})


def test_a_server_optimizer_replaces_the_recipes_own():
    own, given = Settings(recipe="features"), Settings(recipe="features", server_optimizer="yogi")
    assert own.composed.server_optimizer == RECIPES["features"].server_optimizer
    assert given.composed.server_optimizer == SERVER_OPTIMIZERS["yogi"]
    assert Settings(server_optimizer="momentum").composed.server_optimizer == (SERVER_OPTIMIZERS["momentum"])


@pytest.mark.parametrize("recipe", ["auto-features", "auto"])
def test_a_server_optimizer_is_also_that_of_the_rounds_that_average(recipe):
    composed = Settings(recipe=recipe, server_optimizer="yogi").composed
    assert composed.averaging.server_optimizer == SERVER_OPTIMIZERS["yogi"]
    assert composed.averaging.refit is None


def test_a_regulariser_is_the_heads_where_nothing_else_is_solved_for():
    assert Settings(recipe="head", ridge=0.5).composed.refit.head.strength == 0.5
    both = Settings(recipe="auto-features", ridge=0.5).composed
    assert (both.refit.ridge, both.refit.head) == (0.5, RECIPES["auto-features"].refit.head)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_does(name):
    description = Settings.model_fields[name].description
    assert description
    assert len(description.split()) >= 3
