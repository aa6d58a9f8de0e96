"""Fedbasin's own recipes: the real server, with the `fedbasin.*` settings that the rule names."""

import tempfile
from dataclasses import replace

from flwr.app import ArrayRecord

from fedbasin.strategies.fusion.lora.lora_factors import as_module
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.symmetry.discover.discovery import discover
from tests import running
from tests.protocol.experiment import Experiment
from tests.protocol.spec import Spec
from tests.protocol.travelling import has_adapters, state_of


def run(experiment: Experiment, rule: Spec, rounds: int) -> None:
    """Run a recipe from the shared start that all rules have.

    From a shared start alignment is the identity, and is left out unless the rule asks for it; recipes for adapters have
    a symmetry of their own. With `held_out=0.1` the mod compares models by a tenth of what the clients train on, as for
    an app that keeps no examples for evaluation.

    Raises:
        SettingsError: no recipe or setting has that name; the message lists those there are.
    """
    settings = dict(rule.settings)
    experiment = replace(experiment, held_out=settings.pop("held_out", None))
    model = experiment.make_model(experiment.seed)
    whole = not has_adapters(model)
    with tempfile.TemporaryDirectory() as folder:
        federation = experiment.federation(
            {
                "fedbasin.align": "client" if _turns(rule) else "off",
                "fedbasin.fraction-evaluate": 0.0,
                "fedbasin.poll-seconds": 0.001,
                "fedbasin.min-available-nodes": len(experiment.slices),
                "fedbasin.packed": True,
                "fedbasin.quorum": 1.0,
                "fedbasin.folder": folder,
                "fedbasin.recipe": rule.name,
                **{f"fedbasin.{key.replace('_', '-')}": value for key, value in settings.items()},
            }
        )
        aligns = whole and federation.run_config["fedbasin.align"] != "off"
        running.run(
            federation,
            model if whole else as_module(state_of(model)),
            rounds,
            symmetry=discover(model, experiment.task.train[0][:2]).symmetry if aligns else None,
            evaluate_fn=lambda number, arrays: _measure(experiment, number, arrays),
        )


def _turns(rule: Spec) -> bool:
    return rule.name in RECIPES and RECIPES[rule.name].lora is not None


def _measure(experiment: Experiment, server_round: int, arrays: ArrayRecord) -> None:
    experiment.measure_state(server_round, arrays.to_torch_state_dict())
