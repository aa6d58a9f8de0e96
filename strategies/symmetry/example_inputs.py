"""Example inputs of a model: a tensor, several in the order of its arguments, or a mapping by their names."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fedbasin.strategies.symmetry.symmetry import SymmetryError

Example: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def positional_inputs(model: nn.Module, *inputs: Example | None) -> tuple[Tensor | None, ...]:
    """Return example inputs in the order of the arguments of the model's forward method.

    Args:
        model: the model.
        inputs: arguments of its forward method; or one sequence of them; or one mapping by their names, as a tokenizer
            returns it. None stands for an argument that is left out.

    Returns:
        One entry for each argument up to the last that is given; None for those between that have no value.

    Raises:
        SymmetryError: an input is not a tensor, or the model has no argument of a name.
    """
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return _by_signature(model, inputs[0])
    if len(inputs) == 1 and isinstance(inputs[0], list | tuple):
        inputs = tuple(inputs[0])
    return tuple(_require_tensor(f"number {position}", value) for position, value in enumerate(inputs))


def redraw(inputs: Sequence[Tensor | None], generator: torch.Generator) -> tuple[Tensor | None, ...]:
    """Return random inputs of the same shapes; those that are not floating, such as tokens, are kept."""

    def draw(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)

    return tuple(map(draw, inputs))


def _by_signature(model: nn.Module, named: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
    arguments = list(inspect.signature(model.forward).parameters.values())
    positional = [a.name for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    unknown = sorted(set(named) - set(positional))
    if unknown:
        raise SymmetryError(
            f"the example has inputs {', '.join(map(repr, unknown))}, which are not among the arguments of "
            f"{type(model).__name__}: {', '.join(positional)}; leave them out"
        )
    length = max((positional.index(name) + 1 for name in named), default=0)
    return tuple(_require_tensor(repr(name), named.get(name)) for name in positional[:length])


def _require_tensor(where: str, value: object) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    raise SymmetryError(
        f"input {where} of the example is a {type(value).__name__}; pass a tensor, a tuple of tensors or a mapping from "
        "the model's argument names to tensors"
    )
