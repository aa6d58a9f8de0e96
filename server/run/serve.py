"""A run: rounds of stages over a Flower grid, with checkpoints, reports and resume.

app = ServerApp()

@app.main()
def main(grid, context):
    result = serve(grid, context, model=Net(), rounds=3, symmetry=trace(Net(), example))
"""

import logging
from dataclasses import replace
from pathlib import Path

from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedbasin.server.observe.access import AccessError
from fedbasin.server.observe.push import connect
from fedbasin.server.run import checkpoint
from fedbasin.server.run.agenda import Agenda
from fedbasin.server.run.hooks import Hooks as Hooks
from fedbasin.server.run.loop import Result as Result
from fedbasin.server.run.loop import Run
from fedbasin.server.run.reporter import Reporter
from fedbasin.server.run.settings import Settings, SettingsError, read_settings
from fedbasin.server.run.streaming_grid import StreamingGrid
from fedbasin.strategies.alignment.layer_subset import SubsetError, choose_layers
from fedbasin.strategies.fusion.compression.budget import BudgetError
from fedbasin.strategies.fusion.compression.stage_budget import check_budget
from fedbasin.strategies.fusion.layers import Layer, gram_layers, known_blocks
from fedbasin.strategies.fusion.lora.lora_factors import AdapterError, adapted_layers
from fedbasin.strategies.recipes import Statistic
from fedbasin.strategies.symmetry.check import prove
from fedbasin.strategies.symmetry.symmetry import Symmetry
from fedbasin.strategies.tensors.state import State, tied

# A child of Flower's logger, so that its handlers carry the lines to `flwr run --stream`.
_LOG = logging.getLogger("flwr.fedbasin")


def serve(
    grid: Grid,
    context: Context,
    model: nn.Module,
    rounds: int,
    *,
    symmetry: Symmetry | None = None,
    example: Tensor | tuple[Tensor, ...] | None = None,
    train_config: ConfigRecord | None = None,
    hooks: Hooks | None = None,
) -> Result:
    """Run all rounds, as the run config's `fedbasin.*` keys say.

    Args:
        grid: Flower's.
        context: Flower's; its run config has the settings.
        model: its state is the first anchor; its layers say which statistics clients owe.
        rounds: how many the run has, those before a resume included.
        symmetry: of the model; needed unless `fedbasin.align` is off.
        example: inputs of the model, a batch of zeros will do. With it the symmetry is proven by execution before
            the first message: random elements on random inputs must leave the model's function as it was. None
            trusts the symmetry.
        train_config: the app's own settings for its clients.
        hooks: what the app adds.

    Raises:
        SettingsError: before the first message, for a configuration that cannot be run.
        SymmetryError: before the first message, for a symmetry of another model, or one that changes its function.
        CheckpointError: before the first message, for a folder that cannot be resumed.
        QuorumLostError: a stage failed; the rounds before it are in the run's folder.
    """
    settings = read_settings(context.run_config)
    if example is not None and symmetry is not None and settings.align != "off":
        inputs = example if isinstance(example, tuple) else (example,)
        prove(model, symmetry, *inputs)
    run = _prepare(settings, context, model, rounds, symmetry, hooks or Hooks())
    streaming = StreamingGrid(grid, settings.poll_seconds)
    return run.all_rounds(streaming, train_config or ConfigRecord())


def _prepare(
    settings: Settings,
    context: Context,
    model: nn.Module,
    rounds: int,
    symmetry: Symmetry | None,
    hooks: Hooks,
) -> Run:
    """Everything that can be refused before work starts."""
    # A copy, because the app may go on working with its model.
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    layers = _layers(settings, model, state)
    # Adapters have a symmetry of their own, and products of factors need none.
    if settings.align != "off" and not (settings.composed.adapters and symmetry is None):
        symmetry = _chosen(settings, symmetry, state)
    _check_observer(settings)
    if settings.bootstrap == "best" and hooks.score is None:
        raise SettingsError(
            "fedbasin.bootstrap = 'best' needs a score; pass Hooks(score=...) to serve"
        )
    blocks = known_blocks(model, settings.composed.statistic)
    try:
        check_budget(settings.composed, layers, settings.statistics_budget_bytes)
    except BudgetError as error:
        raise SettingsError(f"fedbasin.{error}") from error
    folder = settings.folder / str(context.run_id)
    begun = checkpoint.Checkpoint(0, state, settings.decisive)
    if settings.resume:
        folder = Path(settings.resume)
        begun = _resumed(folder, settings, state)
    return Run(
        Agenda(settings, symmetry, blocks, layers, hooks.score),
        Reporter(str(context.run_id), rounds, settings.recipe),
        hooks,
        tied(model.state_dict()),
        folder,
        begun,
    )


def _chosen(settings: Settings, symmetry: Symmetry | None, state: State) -> Symmetry:
    """The spaces that are aligned, which must be the model's."""
    if symmetry is None:
        raise SettingsError(
            f"fedbasin.align = {settings.align!r} needs the model's symmetry; pass "
            "symmetry=trace(model, example_input) to serve, or set fedbasin.align = 'off'"
        )
    symmetry.check(state)
    try:
        symmetry = choose_layers(symmetry, settings.layers)
    except SubsetError as error:
        raise SettingsError(f"fedbasin.{error}") from error
    _check_folds(settings, symmetry)
    return symmetry


def _layers(settings: Settings, model: nn.Module, state: State) -> list[Layer]:
    """Those that clients may speak of."""
    if settings.composed.adapters is None:
        return gram_layers(model)
    try:
        return adapted_layers(state)
    except AdapterError as error:
        raise SettingsError(f"fedbasin.recipe: {error}") from error


def _check_folds(settings: Settings, symmetry: Symmetry) -> None:
    """Say that folding makes the global model another parametrisation, or that it cannot be done."""
    if not symmetry.folds:
        return
    if settings.align == "server" and settings.composed.statistic is not Statistic.none:
        raise SettingsError(
            f"fedbasin.align = 'server' with recipe = {settings.recipe!r}: the symmetry folds norms into their "
            "readers, whose statistics cannot follow; set fedbasin.align = 'client'"
        )
    _LOG.info(
        "the symmetry folds %d norms: in the global model their gains will be 1",
        len(symmetry.folds),
    )


def _check_observer(settings: Settings) -> None:
    """Whether what the run is to show its observer can be used; whether that answers is no condition."""
    try:
        if settings.observer:
            connect(settings.observer, settings.observer_pass).close()
    except AccessError as error:
        raise SettingsError(f"fedbasin.observer = {settings.observer!r}: {error}") from error


def _resumed(folder: Path, settings: Settings, state: State) -> checkpoint.Checkpoint:
    found = checkpoint.load(folder)
    ours, theirs = settings.decisive, found.settings
    if ours != theirs:
        raise SettingsError(
            f"{folder} was made with {theirs}, and this run has {ours}; use the same settings"
        )
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    if shapes != {name: (tensor.shape, tensor.dtype) for name, tensor in found.model.items()}:
        raise SettingsError(
            f"{folder} holds another model; resume with the model class that made it"
        )
    return replace(found, model={name: found.model[name] for name in state})
