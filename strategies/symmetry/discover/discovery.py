"""Discover the symmetry of a model from its forward pass.

Two traces are used. torch.fx knows modules, so it also follows the attention layers of torch. Where it fails, or
where an operation without a rule leaves parameters in no space, torch.export is tried, which knows only operators but
resolves decisions by shape or type. Families of published transformers, with rotary positions for example, are in
`models/`; any other symmetry can be written in the notation.
"""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

from torch import Tensor, nn

from fedbasin.strategies.symmetry.coverage import Coverage, coverage
from fedbasin.strategies.symmetry.discover.exported_graph import follow_exported
from fedbasin.strategies.symmetry.discover.module_graph import UntraceableError, follow_modules
from fedbasin.strategies.symmetry.discover.units import UnitTable
from fedbasin.strategies.symmetry.example_inputs import Example, positional_inputs
from fedbasin.strategies.symmetry.symmetry import Symmetry, SymmetryError

Progress = Callable[[str, float], None]
"""Told what is being done, and the fraction of the work that is done, 0 to 1."""


@dataclass(frozen=True)
class Stop:
    """A part of a model that does not move.

    Attributes:
        part: name of the layer that writes the units, or of the tensor.
        operation: what keeps them in place, such as "aten.cumsum" or "output".
        source: file and line of the model that calls the operation, or "".
    """

    part: str
    operation: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.operation} fixes the units of {self.part!r}" + (f" ({self.source})" if self.source else "")


@dataclass(frozen=True)
class Discovery:
    """The symmetry of a model, how much of the model it moves, and what keeps the rest in place.

    Attributes:
        symmetry: the spaces in forward order, named after the module that writes each, and the shifts.
        coverage: the share of the parameters that move, in all and by kind of group.
        stops: the parts that do not move; inputs and labels are fixed by nature and are not named.
    """

    symmetry: Symmetry
    coverage: Coverage
    stops: tuple[Stop, ...]


def discover(
    model: nn.Module,
    *example: Example | None,
    cache: MutableMapping[str, str] | None = None,  # noqa: ARG001 - part of the interface that is built next
    progress: Progress | None = None,  # noqa: ARG001
) -> Discovery:
    """Trace a model in training and evaluation mode, and return its symmetry with the reasons why units are fixed.

    The result of torch.fx is preferred unless that of torch.export covers a larger fraction of the parameters. The
    latter is valid for inputs whose shapes differ from those of the example only in the length of the batch.

    Args:
        model: a module that torch.fx or torch.export can trace; it is not changed.
        example: arguments of its forward method, or one mapping of them by name, in a batch of at least two.
        cache: notations of symmetries that were discovered before, by the digest of the model.
        progress: called while the work goes on.

    Raises:
        SymmetryError: neither can trace the model, it does not run on the example, or hooks run with it.
    """
    inputs = positional_inputs(model, *example)
    # torch.fx first: it knows attention layers, whose heads torch.export leaves in place.
    try:
        table = follow_modules(model, *inputs)
    except UntraceableError as error:
        return _discovery(model, _follow_exported_instead(model, inputs, error))
    traced = _discovery(model, table)
    fraction = traced.coverage.fraction
    # Without a stop the rest of the parameters is fixed by nature, and an export takes seconds.
    if not traced.stops or fraction == 1:
        return traced
    try:
        exported = _discovery(model, follow_exported(model, *inputs))
    except SymmetryError:
        return traced
    return exported if exported.coverage.fraction > fraction else traced


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


def _discovery(model: nn.Module, table: UnitTable) -> Discovery:
    symmetry = table.symmetry()
    stops = tuple(Stop(part, operation) for operation, part in table.stopped)
    return Discovery(symmetry, coverage(symmetry, dict(model.named_parameters())), stops)
