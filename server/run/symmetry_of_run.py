"""The symmetry by which a run aligns: given, or derived from the model, proven, and told in the log."""

import logging

from torch import nn

from fedbasin.server.run.settings import Settings, SettingsError
from fedbasin.strategies.alignment.layer_subset import SubsetError, choose_layers
from fedbasin.strategies.recipes import RECIPES
from fedbasin.strategies.round.fuse import Align
from fedbasin.strategies.symmetry.check import prove
from fedbasin.strategies.symmetry.coverage import coverage
from fedbasin.strategies.symmetry.discover.discovery import discover
from fedbasin.strategies.symmetry.example_inputs import Example
from fedbasin.strategies.symmetry.models.families import FAMILIES, family
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
    inputs = () if example is None else (example,)
    stopped: tuple[str, ...] = ()
    if symmetry is None:
        symmetry, stopped = _derived(model, inputs, state)
    if symmetry is None:
        return _without(settings, model)
    symmetry.check(state)
    if model is not None and inputs:
        prove(model, symmetry, *inputs)
    if not symmetry.spaces:
        return _empty(settings, stopped)
    try:
        symmetry = choose_layers(symmetry, settings.layers)
    except SubsetError as error:
        raise SettingsError(str(error)) from error
    align: Align = "client" if settings.align == "auto" else settings.align
    covered = coverage(symmetry, state)
    kinds = ", ".join(f"{kind} {100 * fraction:.0f} %" for kind, fraction in covered.by_kind.items())
    proof = "proven by execution" if model is not None and inputs else "not proven: no example="
    _LOG.info(
        "symmetry: %d spaces cover %.0f %% of the parameters (%s), %s; aligned by the %s%s",
        len(symmetry.spaces),
        100 * covered.fraction,
        kinds,
        proof,
        align,
        f"; kept in place by {'; '.join(stopped[:3])}" if stopped else "",
    )
    return align, symmetry


def _derived(
    model: nn.Module | None, inputs: tuple[Example, ...], state: State
) -> tuple[Symmetry | None, tuple[str, ...]]:
    """Return the symmetry of a model, and the operations that kept units in place; None where it is not known."""
    if model is None:
        return None, ()
    if inputs:
        discovery = discover(model, *inputs, progress=_log_progress)
        return discovery.symmetry, tuple(map(str, discovery.stops))
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    return (family(str(model_type), config, state) if model_type in FAMILIES else None), ()


def _log_progress(what: str, fraction: float) -> None:
    _LOG.debug("symmetry: %s (%.0f %%)", what, 100 * fraction)


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
