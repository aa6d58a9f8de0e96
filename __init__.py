"""Federated aggregation on Flower that aligns the clients' models before it fuses them.

    from fedbasin import FedBasin                                   # in the ServerApp, in place of Flower's FedAvg
    from fedbasin import basin                                      # in the ClientApp: ClientApp(mods=[basin(model=Net)])
    from fedbasin import align, discover, Update, fuse, barrier        # on models at hand

Names are imported when they are first used, so that a client does not load what only a server needs.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedbasin.client.mod import basin as basin
    from fedbasin.proto.report import RoundReport as RoundReport
    from fedbasin.server.run.distillation_set import DistillationSet as DistillationSet
    from fedbasin.server.run.probe_set import ProbeSet as ProbeSet
    from fedbasin.server.run.result import RunResult as RunResult
    from fedbasin.server.run.settings import SettingsError as SettingsError
    from fedbasin.server.strategy import FedBasin as FedBasin
    from fedbasin.strategies.alignment.weight_matching import match_weights
    from fedbasin.strategies.analytic.bucketed_features import BucketedFeatures as BucketedFeatures
    from fedbasin.strategies.analytic.deep_analytic import DeepAnalytic as DeepAnalytic
    from fedbasin.strategies.analytic.random_features import RandomFeatures as RandomFeatures
    from fedbasin.strategies.diagnostics.loss_path import barrier as barrier
    from fedbasin.strategies.fusion.accumulator import fuse as fuse
    from fedbasin.strategies.fusion.update import Update as Update
    from fedbasin.strategies.recipes import RECIPES as RECIPES
    from fedbasin.strategies.symmetry.check import check as check
    from fedbasin.strategies.symmetry.discover.discovery import discover as discover
    from fedbasin.strategies.symmetry.symmetry import Symmetry as Symmetry
    from fedbasin.strategies.symmetry.symmetry import parse as parse
    from fedbasin.strategies.tasks.model_task import Task as Task

    # Type checkers re-export an import under its own name alone.
    align = match_weights

_HOMES = {
    "BucketedFeatures": "strategies.analytic.bucketed_features",
    "DeepAnalytic": "strategies.analytic.deep_analytic",
    "DistillationSet": "server.run.distillation_set",
    "FedBasin": "server.strategy",
    "ProbeSet": "server.run.probe_set",
    "RECIPES": "strategies.recipes",
    "RandomFeatures": "strategies.analytic.random_features",
    "RoundReport": "proto.report",
    "RunResult": "server.run.result",
    "SettingsError": "server.run.settings",
    "Symmetry": "strategies.symmetry.symmetry",
    "Task": "strategies.tasks.model_task",
    "Update": "strategies.fusion.update",
    "align": "strategies.alignment.weight_matching:match_weights",
    "barrier": "strategies.diagnostics.loss_path",
    "basin": "client.mod",
    "check": "strategies.symmetry.check",
    "discover": "strategies.symmetry.discover.discovery",
    "fuse": "strategies.fusion.accumulator",
    "parse": "strategies.symmetry.symmetry",
}

__version__ = _version("fedbasin")
__all__ = sorted(["__version__", *_HOMES])


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedbasin' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(f"fedbasin.{module}"), attribute or name)


def __dir__() -> list[str]:
    return __all__
