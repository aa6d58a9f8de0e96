"""One run of FedBasin over a federation in this process."""

from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from torch import nn

from fedbasin.server.run.result import RunResult
from fedbasin.server.strategy import FedBasin
from tests.federation import Federation

_ARGUMENTS_OF_START = {"timeout", "train_config", "evaluate_config", "evaluate_fn"}


def run(
    federation: Federation, model: nn.Module, rounds: int = 1, *, grid: Grid | None = None, **arguments: Any
) -> RunResult:
    """Compose FedBasin with the federation's run config, and start it from the model's tensors.

    The recipe is `fedavg` where none is named: most tests look at one stage, and those of the default name `auto`.

    Args:
        federation: the clients.
        model: the app's model.
        rounds: number of rounds.
        grid: the grid, where the federation's own does not do.
        arguments: further arguments of `FedBasin` and of `FedBasin.start`.
    """
    if "fedbasin.recipe" not in federation.run_config:
        arguments.setdefault("recipe", "fedavg")
    start = {name: arguments.pop(name) for name in _ARGUMENTS_OF_START & arguments.keys()}
    strategy = FedBasin(model=model, context=federation.server_context(), **arguments)
    arrays = ArrayRecord(model.state_dict())
    return strategy.start(grid or federation.grid(), arrays, rounds, **start)
