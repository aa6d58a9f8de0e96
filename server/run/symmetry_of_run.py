"""The symmetry by which a run aligns: given, or derived from the model, proven, and told in the log."""

import logging

from torch import nn

from fedbasin.server.files.library.library_inputs import example_inputs
from fedbasin.server.files.symmetry_cache import SymmetryCache
from fedbasin.server.run.settings import Settings, SettingsError
from fedbasin.strategies.alignment.layer_subset import SubsetError, choose_layers
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.fuse import Align
from fedbasin.strategies.symmetry.check import prove
from fedbasin.strategies.symmetry.coverage import coverage
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.example_inputs import Example
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError
from fedbasin.strategies.tensors.state import State

_LOG = logging.getLogger("flwr.fedbasin")


def symmetry_of_run(
    settings: Settings, model: nn.Module | None, example: Example | None, symmetry: Symmetry | None, state: State
) -> tuple[Align, Symmetry | None]:
    """Return the side that aligns, and the symmetry by which it does.

    Args:
        settings: the settings of the run.
        model: the app's model, if it is known.
        example: inputs of the model, if they are known.
        symmetry: the symmetry that was given; None derives it.
        state: the initial model.

    Raises:
        SettingsError: alignment is wanted and no symmetry is known, or it moves nothing where clients begin apart.
        SymmetryError: the symmetry is another model's, or changes the function of the model.
    """
    if settings.align == "off":
        return "off", None
    # Adapters have a symmetry of their own, and products of factors need none.
    if RECIPES[settings.recipe].lora is not None and symmetry is None:
        return "client" if settings.align == "auto" else settings.align, None
    inputs = _inputs(model, example)
    stopped: tuple[str, ...] = ()
    given = symmetry
    if symmetry is None:
        symmetry, stopped = _derived(model, inputs)
    if symmetry is None:
        return _without(settings, model)
    symmetry.check(state)
    if given is not None and model is not None and inputs:
        prove(model, symmetry, *inputs)
    if not symmetry.spaces:
        return _empty(settings, stopped)
    try:
        symmetry = choose_layers(symmetry, settings.layers)
    except SubsetError as error:
        raise SettingsError(str(error)) from error
    align: Align = "client" if settings.align == "auto" else settings.align
    proof = "proven by execution" if model is not None and inputs else "not proven: no example="
    side = f"aligned by the {align}" + (f"; kept in place by {'; '.join(stopped[:3])}" if stopped else "")
    _log_coverage(symmetry, state, f"{proof}; {side}")
    return align, symmetry


def _log_coverage(symmetry: Symmetry, state: State, remark: str) -> None:
    covered = coverage(symmetry, state)
    kinds = ", ".join(f"{kind} {100 * fraction:.0f} %" for kind, fraction in covered.by_kind.items())
    spaces, percent = len(symmetry.spaces), 100 * covered.fraction
    _LOG.info("symmetry: %d spaces cover %.0f %% of the parameters (%s), %s", spaces, percent, kinds, remark)


def _derived(model: nn.Module | None, inputs: tuple[Example, ...]) -> tuple[Symmetry | None, tuple[str, ...]]:
    """Return the symmetry of a model, and the operations that kept units in place; None where it is not known."""
    if model is None or not inputs:
        return None, ()
    discovery = discover(model, *inputs, cache=SymmetryCache(), progress=_log_progress)
    return discovery.symmetry, tuple(map(str, discovery.stops))


def _log_progress(what: str, fraction: float) -> None:
    _LOG.debug("symmetry: %s (%.0f %%)", what, 100 * fraction)


def _inputs(model: nn.Module | None, example: Example | None) -> tuple[Example, ...]:
    """Return the example that was given, or one from the config of a model of the `transformers` library."""
    if example is not None:
        return (example,)
    return (example_inputs(model),) if model is not None and hasattr(model, "main_input_name") else ()


def _without(settings: Settings, model: nn.Module | None) -> tuple[Align, None]:
    missing = "example=inputs" if model is not None else "model=Net(), example=inputs"
    remedy = f"pass {missing} to FedBasin, or symmetry=..."
    if settings.align != "auto":
        raise SettingsError(
            f"align = {settings.align!r} needs the symmetry of the model; {remedy}, or set align = 'off'"
        )
    if settings.start == "own":
        raise SettingsError(
            f"start = 'own' needs the symmetry of the model: clients that begin apart must be aligned; {remedy}, or "
            "set align = 'off' to average them as they are"
        )
    _LOG.info("clients are not aligned: the symmetry of the model is not known; %s", remedy)
    return "off", None


def _empty(settings: Settings, stopped: tuple[str, ...]) -> tuple[Align, None]:
    reason = "; ".join(stopped[:3]) or "the symmetry that was given has no spaces"
    if settings.start == "own":
        raise SymmetryError(
            f"nothing of the model can be aligned ({reason}), and clients begin apart with start = 'own'; pass a "
            "symmetry as text, or set align = 'off' to average them as they are"
        )
    _LOG.info("clients are not aligned: nothing of the model can be moved (%s)", reason)
    return "off", None
