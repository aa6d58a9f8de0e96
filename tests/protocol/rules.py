"""The catalogue of rules: closed-form heads, clients alone, Flower's strategies, and any recipe of fedbasin."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedbasin.strategies.recipes import RECIPES
from tests.protocol import alone, flower, heads, recipes
from tests.protocol.experiment import Record, prepare
from tests.protocol.setting import Setting
from tests.protocol.spec import Spec, SpecError, listed, made, parse

# Rules that are finished after one round.
SINGLE: dict[str, Callable[..., None]] = {
    "RidgeHead": heads.ridge,
    "RandomFeaturesHead": heads.random_features,
    "Alone": alone.alone,
    "Ensemble": alone.ensemble,
}


def names() -> list[str]:
    """Of every rule."""
    return [*RECIPES, *flower.STRATEGIES, *SINGLE]


def check(rule: Spec) -> None:
    """Whether there is such a rule.

    Raises:
        SpecError: there is none; the message lists those there are.
    """
    if rule.name not in names():
        raise SpecError(f"no rule is called {rule.name!r}; there are {listed(names())}")


def rounds_of(rule: str, rounds: int) -> int:
    """How far a rule goes: one round for a closed form."""
    return 1 if parse(rule).name in SINGLE else rounds


def run(setting: Setting, rounds: int, cache_folder: Path, record: Record) -> None:
    """Run one setting, handing each point over as it is measured.

    Raises:
        SpecError: the setting names something that does not exist.
    """
    rule = parse(setting.rule)
    check(rule)
    experiment = prepare(setting, cache_folder, record)
    if rule.name in SINGLE:
        made("rule", rule, {rule.name: partial(SINGLE[rule.name], experiment)})
    elif rule.name in flower.STRATEGIES:
        flower.run(experiment, rule, rounds)
    else:
        recipes.run(experiment, rule, rounds)
