"""Discover the symmetry of a model from its forward pass.

Two traces are used. torch.fx knows modules, so it also follows the attention layers of torch. Where it fails, or
where an operation without a rule leaves parameters in no space, torch.export is tried, which knows only operators but
resolves decisions by shape or type. Families of published transformers, with rotary positions for example, are in
`models/`; any other symmetry can be written in the notation.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from fedbasin.strategies.symmetry.coverage import coverage
from fedbasin.strategies.symmetry.discover.exported_graph import follow_exported
from fedbasin.strategies.symmetry.discover.module_graph import UntraceableError, follow_modules
from fedbasin.strategies.symmetry.discover.units import UnitTable
from fedbasin.strategies.symmetry.example_inputs import Example, positional_inputs
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError


@dataclass(frozen=True)
class Discovery:
    """A symmetry found by tracing, and the operations that kept it from being larger.

    Attributes:
        symmetry: the spaces in forward order, named after the module that writes each, and the shifts.
        stopped: one sentence for each operation that fixed units or parameters, such as "torch.cumsum fixes the units
            of 'net.3'". Inputs and labels are fixed by nature and are not named.
    """

    symmetry: Symmetry
    stopped: tuple[str, ...]


def trace(model: nn.Module, *example_inputs: Example | None) -> Symmetry:
    """Return the symmetry of a model, as `discover` finds it.

    Args:
        model: a module that torch.fx or torch.export can trace; it is not changed.
        example_inputs: arguments of its forward method, or one mapping of them by name, in a batch of at least two.

    Raises:
        SymmetryError: the model cannot be traced, or does not run on the example.
    """
    return discover(model, *example_inputs).symmetry


def discover(model: nn.Module, *example_inputs: Example | None) -> Discovery:
    """Trace a model in training and evaluation mode, and return its symmetry with the reasons why units are fixed.

    The result of torch.fx is preferred unless that of torch.export covers a larger fraction of the parameters. The
    latter is valid for inputs whose shapes differ from those of the example only in the length of the batch.

    Args:
        model: a module that torch.fx or torch.export can trace; it is not changed.
        example_inputs: arguments of its forward method, or one mapping of them by name, in a batch of at least two.

    Raises:
        SymmetryError: neither can trace the model, it does not run on the example, or hooks run with it.
    """
    inputs = positional_inputs(model, *example_inputs)
    # torch.fx first: it knows attention layers, whose heads torch.export leaves in place.
    try:
        table = follow_modules(model, *inputs)
    except UntraceableError as error:
        return _discovery(_follow_exported_instead(model, inputs, error))
    traced = _discovery(table)
    parameters = dict(model.named_parameters())
    fraction = coverage(traced.symmetry, parameters).fraction
    # Without a stop the rest of the parameters is fixed by nature, and an export takes seconds.
    if not traced.stopped or fraction == 1:
        return traced
    try:
        exported = _discovery(follow_exported(model, *inputs))
    except SymmetryError:
        return traced
    is_larger = coverage(exported.symmetry, parameters).fraction > fraction
    return exported if is_larger else traced


def _follow_exported_instead(
    model: nn.Module, inputs: tuple[Tensor | None, ...], failure: UntraceableError
) -> UnitTable:
    try:
        return follow_exported(model, *inputs)
    except SymmetryError as error:
        raise SymmetryError(
            f"{failure}; {error}; keep the forward pass free of decisions that depend on data, or write "
            "the symmetry as text and read it with `parse`"
        ) from failure


def _discovery(table: UnitTable) -> Discovery:
    return Discovery(table.symmetry(), tuple(table.stopped))
